// SPDX-License-Identifier: Apache-2.0
// hopyard quantize: a BF16 checkpoint layer in another format, with error statistics.
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <utility>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "hopyard/checkpoint.h"

#include "cli/commands.h"
#include "cli/layer_source.h"
#include "cli/machine.h"
#include "cli/owned_layer.h"
#include "core/error.h"
#include "core/parallel.h"

namespace hopyard::cli {
namespace {

struct QuantizeOptions {
  LayerRequest layer;
  std::string output;
};

// Error of all matrices of one kind.
struct ErrorStatistics {
  double max_error = 0.0;
  double squared_error = 0.0;
  double squared_values = 0.0;
  int64_t elements = 0;

  void Merge(const ErrorStatistics& other) {
    max_error = std::max(max_error, other.max_error);
    squared_error += other.squared_error;
    squared_values += other.squared_values;
    elements += other.elements;
  }
  [[nodiscard]] double relative_rms() const {
    return squared_values > 0.0 ? std::sqrt(squared_error / squared_values) : 0.0;
  }
  // Infinite without error: JSON then shows null.
  [[nodiscard]] double snr_db() const { return -20.0 * std::log10(relative_rms()); }
};

// Compares rows in parallel; buffers are reused between matrices.
class ErrorMeter {
 public:
  ErrorStatistics Measure(const TensorView& source, const QuantizedView& result) {
    const int64_t rows = source.shape[0];
    const int64_t cols = source.shape[1];
    wanted_.resize(static_cast<size_t>(rows * cols));
    got_.resize(wanted_.size());
    QuantizedView original;
    original.codes = source;
    Dequantize(original, TensorView::Contiguous(wanted_.data(), DType::kFloat32, {rows, cols}));
    Dequantize(result, TensorView::Contiguous(got_.data(), DType::kFloat32, {rows, cols}));
    std::vector<ErrorStatistics> per_row(static_cast<size_t>(rows));
    ParallelFor(0, rows, 16, MaxThreads(), [&](int64_t row, int /*thread*/) {
      per_row[static_cast<size_t>(row)] = MeasureRow(row * cols, cols);
    });
    // Merged in row order: the figures do not depend on the number of threads.
    ErrorStatistics total;
    for (const ErrorStatistics& row : per_row) {
      total.Merge(row);
    }
    return total;
  }

 private:
  [[nodiscard]] ErrorStatistics MeasureRow(int64_t begin, int64_t cols) const {
    ErrorStatistics row;
    row.elements = cols;
    for (int64_t i = begin; i < begin + cols; ++i) {
      const double value = wanted_[static_cast<size_t>(i)];
      const double error = std::abs(got_[static_cast<size_t>(i)] - value);
      row.max_error = std::max(row.max_error, error);
      row.squared_error += error * error;
      row.squared_values += value * value;
    }
    return row;
  }

  std::vector<float> wanted_;
  std::vector<float> got_;
};

std::string KindOf(const MatrixId& id) {
  return std::string(id.shared ? "shared." : "experts.") + (id.gemm2 ? "down" : "gate_up");
}

// Names of the safetensors format. Scales in e8m0 travel as bytes, as published MX checkpoints do.
std::string FileType(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return "BF16";
    case DType::kFloat32:
      return "F32";
    case DType::kE4m3:
      return "F8_E4M3";
    default:
      return "U8";
  }
}

void AppendTensor(const std::string& name, const TensorView& view,
                  std::vector<NamedTensor>* tensors) {
  if (view.defined()) {
    tensors->push_back({name, FileType(view.dtype),
                        std::vector<int64_t>(view.shape.begin(), view.shape.begin() + view.ndim),
                        view.data});
  }
}

void WriteLayer(const std::string& path, const std::string& name, const OwnedLayer& layer) {
  std::vector<NamedTensor> tensors;
  const auto append = [&](const MatrixId& id, const OwnedMatrices& matrices) {
    if (matrices.experts() == 0) {
      return;
    }
    const std::string prefix = name + "." + KindOf(id) + ".";
    AppendTensor(prefix + "codes", matrices.codes(), &tensors);
    AppendTensor(prefix + "scales", matrices.scales(), &tensors);
    AppendTensor(prefix + "global_scales", matrices.global_scales(), &tensors);
  };
  append({false, false, 0}, layer.routed.gemm1);
  append({false, true, 0}, layer.routed.gemm2);
  append({true, false, 0}, layer.shared.gemm1);
  append({true, true, 0}, layer.shared.gemm2);
  WriteSafetensors(path, tensors);
}

std::string_view RowOrderName(RowOrder order) {
  switch (order) {
    case RowOrder::kUpGate:
      return "up_gate";
    case RowOrder::kGateUp:
      return "gate_up";
    case RowOrder::kInterleavedGateUp:
      return "interleaved_gate_up";
    case RowOrder::kInterleavedUpGate:
      return "interleaved_up_gate";
  }
  return "?";
}

void Print(const std::map<std::string, ErrorStatistics>& statistics, const LayerPlan& plan,
           const OwnedLayer& layer, bool json) {
  const auto before = LayerBytes(plan.checkpoint->spec);
  Json result = {{"layer", plan.name},
                 {"from", ToString(plan.checkpoint->spec.weights)},
                 {"to", ToString(plan.spec.weights)},
                 {"row_order", RowOrderName(layer.routed.row_order)},
                 {"bytes", layer.bytes()},
                 {"source_bytes", before}};
  for (const auto& [kind, error] : statistics) {
    result["errors"][kind] = {{"elements", error.elements},
                              {"max_error", error.max_error},
                              {"relative_rms", error.relative_rms()},
                              {"snr_db", error.snr_db()}};
  }
  if (json) {
    PrintJson(result);
    return;
  }
  fmt::print("layer    {}\nweights  {} {} -> {} {}, gate and up rows as {}\n", plan.name,
             ToString(plan.checkpoint->spec.weights), HumanBytes(before),
             ToString(plan.spec.weights), HumanBytes(layer.bytes()),
             RowOrderName(layer.routed.row_order));
  fmt::print("{:<16} {:>12} {:>12} {:>13} {:>8}\n", "matrices", "elements", "max error",
             "relative rms", "SNR dB");
  for (const auto& [kind, error] : statistics) {
    fmt::print("{:<16} {:>12} {:>12.4g} {:>13.4g} {:>8.1f}\n", kind, error.elements,
               error.max_error, error.relative_rms(), error.snr_db());
  }
}

void Run(const QuantizeOptions& options, bool json) {
  const LayerPlan plan = ResolveLayer(options.layer);
  HOPYARD_CHECK(plan.checkpoint.has_value(), kInvalidArgument)
      << "'" << options.layer.target << (plan.stated ? "' is a spec file" : "' is a preset")
      << "; quantize wants a checkpoint directory";
  HOPYARD_CHECK(plan.checkpoint->spec.weights == WeightFormat::kBf16, kUnsupported)
      << plan.name << " is " << ToString(plan.checkpoint->spec.weights)
      << "; only bf16 layers can be quantised";
  const int64_t rows = plan.spec.gemm1_rows();
  // Codes, the scratch matrix and the meter's two float copies.
  const int64_t need = LayerBytes(plan.spec) + rows * plan.spec.hidden_size * 10;
  CheckMemory(plan.name + ": the quantised weights", need, "use a smaller format");
  std::map<std::string, ErrorStatistics> statistics;
  ErrorMeter meter;
  const auto layer = RequantizedLayer(
      plan.spec, plan.checkpoint->weights,
      [&](const MatrixId& id, const TensorView& source, const QuantizedView& result) {
        statistics[KindOf(id)].Merge(meter.Measure(source, result));
      });
  if (!options.output.empty()) {
    WriteLayer(options.output, plan.name, *layer);
  }
  Print(statistics, plan, *layer, json);
}

}  // namespace

void AddQuantizeCommand(CLI::App& app, CommandContext* context) {
  CLI::App* command = app.add_subcommand(
      "quantize", "A BF16 checkpoint layer in another format, with error statistics");
  auto options = std::make_shared<QuantizeOptions>();
  command->add_option("checkpoint", options->layer.target, "Checkpoint directory")->required();
  command->add_option("--layer", options->layer.layer, "Layer (default: the first with experts)");
  command
      ->add_option("--to", options->layer.weights,
                   "Format: bf16, fp8_block128, fp8_per_tensor, fp8_per_channel, mxfp8, nvfp4, "
                   "mxfp4, mxint4")
      ->required();
  command->add_option("-o,--output", options->output,
                      "Write codes, scales and global scales (.safetensors)");
  AddCommonOptions(*command, context);
  command->final_callback([options, context] { Run(*options, context->common.json); });
}

}  // namespace hopyard::cli
