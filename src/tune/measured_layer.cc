// SPDX-License-Identifier: Apache-2.0
#include "tune/measured_layer.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <numeric>

#include "core/error.h"
#include "core/host_memory.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "plan/backend_sm90.h"
#include "tune/host_calls.h"
#include "tune/same_rows.h"

namespace hopyard::tune {
namespace {

// A round of calls with more tokens than this has a quarter as many: they take milliseconds, and
// read all experts whatever the routing.
constexpr int64_t kFewTokens = 1024;
// A round has no more calls than take about so long: longer ones are steady enough, and a layer
// whose calls take milliseconds from few tokens on is tuned within a minute.
constexpr double kRoundMicroseconds = 3000.0;
// Weights of so many times the last cache push each other out of it as the routings change.
constexpr int64_t kColdCaches = 3;
// What is read between calls otherwise: a cache does not drop the oldest line first.
constexpr int64_t kFlushCaches = 2;
// Outputs up to this are compared whole, of larger ones every so many rows: copying and comparing
// them takes longer than the calls that are timed.
constexpr int64_t kComparedBytes = int64_t{32} << 20;

int64_t LastCache(Device device) {
  return device.kind == DeviceKind::kCpu ? LastLevelCacheBytes() : GpuInfoOf(device.index).l2_bytes;
}

int64_t Bytes(const TensorView& tensor) {
  return tensor.defined() ? tensor.numel() * SizeOf(tensor.dtype) : 0;
}

}  // namespace

Plan LayerTask::MakePlan(const std::string& tactic, int64_t tokens) const {
  PlanOptions plan = options;
  plan.max_tokens = tokens;
  plan.tactic = tactic;
  plan.batch_invariant = true;
  plan.untuned = true;
  plan.tuning = nullptr;
  // Chunks of a capped plan take the kernels for their own number of tokens.
  plan.workspace_cap = 0;
  return hopyard::MakePlan(spec, device, plan);
}

MeasuredLayer::MeasuredLayer(const LayerTask& task, const std::string& untuned, int64_t tokens)
    : task_(task),
      tokens_(tokens),
      sets_(tokens <= kFewTokens ? task.sets : std::max(task.sets / 4, 1)),
      calls_(sets_) {
  const int64_t workspace_bytes = task.MakePlan(untuned, tokens).workspace_bytes();
  const int64_t flush_bytes = FlushBytes();
  CheckMemory(workspace_bytes, flush_bytes);
  workspace_ = DeviceMemory(task.device, workspace_bytes);
  flush_ = DeviceMemory(task.device, flush_bytes);
  MakeInputs();
  MakeOutputs();
}

// 0 where the weights that a round reads are too many for the caches with each kind of routing:
// every call then finds them filled with others', as it does in a model.
int64_t MeasuredLayer::FlushBytes() const {
  if (!task_.cold) {
    return 0;
  }
  int64_t fewest = task_.spec.num_local_experts();
  for (int kind = 0; kind < task_.workload.kinds(); ++kind) {
    fewest = std::min(fewest, task_.workload.ExpertsTouched(kind, tokens_));
  }
  const int64_t cache = LastCache(task_.device);
  // Each of the calls misses so many of the experts.
  const auto local = static_cast<double>(task_.spec.num_local_experts());
  const double missed = std::pow(1.0 - static_cast<double>(fewest) / local, sets_);
  const auto experts = static_cast<int64_t>(local * (1.0 - missed)) + task_.spec.shared.count;
  const int64_t touched = experts * task_.weights.bytes_per_expert();
  // On a CPU reading is most of a small layer's tuning: once over the cache leaves little of it.
  const bool on_cpu = task_.device.kind == DeviceKind::kCpu;
  return touched >= kColdCaches * cache ? 0 : (on_cpu ? 1 : kFlushCaches) * cache;
}

void MeasuredLayer::CheckMemory(int64_t workspace_bytes, int64_t flush_bytes) const {
  const MoeSpec& spec = task_.spec;
  const int64_t slots = spec.slots_per_token();
  const bool ids = task_.workload.mode() != RoutingInput::kLogits;
  const bool logits = task_.workload.mode() != RoutingInput::kUnpacked;
  const int64_t routing =
      (logits ? int64_t{4} * spec.num_experts : 0) + (ids ? int64_t{8} * spec.top_k : 0);
  const int64_t calls = int64_t{task_.workload.kinds()} * sets_;
  const int64_t output =
      task_.options.path.unfinalised ? slots * (2 * spec.hidden_size + 4) : 2 * spec.hidden_size;
  const int64_t per_token = 2 * spec.hidden_size + calls * routing +
                            int64_t{4} * spec.shared.count + output + int64_t{2} * spec.top_k;
  const int64_t need = tokens_ * per_token + workspace_bytes + flush_bytes;
  HOPYARD_CHECK(need <= task_.max_bytes, kOutOfMemory)
      << tokens_ << " tokens need " << need << " bytes for inputs, outputs and workspace; "
      << task_.max_bytes << " may be used (TuneOptions::max_bytes, or half of the free memory)";
}

TensorView MeasuredLayer::Allocate(DType dtype, std::initializer_list<int64_t> shape) {
  const int64_t count =
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  memory_.emplace_back(task_.device, count * SizeOf(dtype));
  return TensorView::Contiguous(memory_.back().data(), dtype, shape, task_.device);
}

// Absent for no values.
template <class T>
TensorView MeasuredLayer::Upload(const std::vector<T>& values, DType dtype,
                                 std::initializer_list<int64_t> shape) {
  if (values.empty()) {
    return {};
  }
  const TensorView tensor = Allocate(dtype, shape);
  CopyBytes(tensor.data, values.data(), Bytes(tensor), task_.device);
  return tensor;
}

void MeasuredLayer::MakeInputs() {
  const MoeSpec& spec = task_.spec;
  const Workload& workload = task_.workload;
  MoeInputs shared;
  shared.routing = workload.mode();
  shared.hidden_states =
      Upload(workload.HiddenStates(tokens_), DType::kBf16, {tokens_, spec.hidden_size});
  shared.shared_weights =
      Upload(workload.SharedWeights(tokens_), DType::kFloat32, {tokens_, spec.shared.count});
  shared.expert_table = Upload(workload.ExpertTable(), DType::kInt32, {spec.num_experts});
  for (int kind = 0; kind < workload.kinds(); ++kind) {
    inputs_.emplace_back();
    for (int set = 0; set < sets_; ++set) {
      const RoutedTokens routed = workload.Make(kind, set, tokens_);
      MoeInputs inputs = shared;
      inputs.logits = Upload(routed.logits, DType::kFloat32, {tokens_, spec.num_experts});
      inputs.expert_ids = Upload(routed.ids, DType::kInt32, {tokens_, spec.top_k});
      inputs.expert_weights = Upload(routed.weights, DType::kFloat32, {tokens_, spec.top_k});
      inputs_.back().push_back(inputs);
    }
  }
}

void MeasuredLayer::MakeOutputs() {
  const MoeSpec& spec = task_.spec;
  const int64_t slots = spec.slots_per_token();
  if (task_.options.path.unfinalised) {
    outputs_.rows = Allocate(DType::kBf16, {tokens_ * slots, spec.hidden_size});
    outputs_.slot_to_row = Allocate(DType::kInt32, {tokens_, slots});
  } else {
    outputs_.output = Allocate(DType::kBf16, {tokens_, spec.hidden_size});
  }
  if (task_.options.path.replay) {
    outputs_.replay = Allocate(DType::kInt16, {tokens_, spec.top_k});
  }
}

device::Call MeasuredLayer::CallOf(const Plan& plan, const MoeInputs& inputs) const {
  const Workspace workspace{workspace_.data(), static_cast<size_t>(workspace_.bytes())};
  return [plan, inputs, workspace, weights = task_.weights, outputs = outputs_](void* stream) {
    Forward(plan, weights, inputs, outputs, workspace, Stream{stream});
  };
}

void MeasuredLayer::Prepare(const std::string& tactic) {
  Tactic made = Record(tactic);
  if (tactics_.empty() && calls_ > 1) {
    static_cast<void>(made.kinds.front()->Run());
    const double us = made.kinds.front()->Run();
    const double fitting = std::ceil(kRoundMicroseconds / std::max(us, 1e-3));
    if (fitting < calls_) {
      calls_ = static_cast<int>(fitting);
      made = Record(tactic);
    }
  }
  tactics_[tactic] = std::move(made);
}

MeasuredLayer::Tactic MeasuredLayer::Record(const std::string& tactic) const {
  Tactic made;
  made.plan = task_.MakePlan(tactic, tokens_);
  const device::Flush flush{flush_.data(), flush_.bytes()};
  for (const std::vector<MoeInputs>& sets : inputs_) {
    std::vector<device::Call> calls;
    std::transform(sets.begin(), sets.begin() + calls_, std::back_inserter(calls),
                   [&](const MoeInputs& inputs) { return CallOf(made.plan, inputs); });
    made.kinds.push_back(
        task_.device.kind == DeviceKind::kCpu
            ? HostCalls(std::move(calls), flush)
            : sm90::NeedBackend().Capture(task_.device.index, task_.stream.handle, calls, flush));
  }
  return made;
}

double MeasuredLayer::Run(const std::string& tactic, int kind) {
  return tactics_.at(tactic).kinds[static_cast<size_t>(kind)]->Run();
}

std::string MeasuredLayer::OfKind(int kind, const std::string& fault) const {
  return fault.empty() ? fault : task_.workload.name(kind) + ": " + fault;
}

std::string MeasuredLayer::Check(const std::string& tactic, const std::string& reference,
                                 int kind) {
  return OfKind(
      kind, DescribeDifference(RowsOf(tactics_.at(tactic).plan, kind), KeptRowsOf(reference, kind),
                               task_.spec.hidden_size, RowBound(task_.spec.activations)));
}

std::string MeasuredLayer::NotFinite(const std::string& tactic, int kind) {
  return OfKind(kind, DescribeNotFinite(KeptRowsOf(tactic, kind), task_.spec.hidden_size));
}

const std::vector<uint16_t>& MeasuredLayer::KeptRowsOf(const std::string& tactic, int kind) {
  if (kept_ != tactic) {
    kept_rows_.clear();
    kept_ = tactic;
  }
  if (kept_rows_.count(kind) == 0) {
    kept_rows_[kind] = RowsOf(tactics_.at(tactic).plan, kind);
  }
  return kept_rows_[kind];
}

// BF16 of these bits is no number: what a kernel leaves out shows.
void MeasuredLayer::Poison(const TensorView& tensor) const {
  constexpr int64_t kPart = int64_t{16} << 20;
  const std::vector<uint8_t> poison(static_cast<size_t>(std::min(Bytes(tensor), kPart)), 0xFF);
  for (int64_t begin = 0; begin < Bytes(tensor); begin += kPart) {
    CopyBytes(tensor.as<uint8_t>() + begin, poison.data(), std::min(Bytes(tensor) - begin, kPart),
              task_.device);
  }
}

std::vector<uint16_t> MeasuredLayer::RowsOf(const Plan& plan, int kind) {
  const int64_t hidden = task_.spec.hidden_size;
  const bool finalised = outputs_.output.defined();
  const TensorView& values = finalised ? outputs_.output : outputs_.rows;
  Poison(values);
  CallOf(plan, inputs_[static_cast<size_t>(kind)].front())(task_.stream.handle);
  Synchronize(task_.device, task_.stream);
  std::vector<int32_t> rows(static_cast<size_t>(values.shape[0]));
  std::iota(rows.begin(), rows.end(), 0);
  if (!finalised) {
    CopyBytes(rows.data(), outputs_.slot_to_row.data, Bytes(outputs_.slot_to_row), task_.device);
  }
  int64_t stride = CeilDiv(Bytes(values), kComparedBytes);
  // Of rows by slot: each slot of a token in its turn.
  while (!finalised && std::gcd(stride, task_.spec.slots_per_token()) > 1) {
    ++stride;
  }
  std::vector<uint16_t> whole(stride == 1 ? static_cast<size_t>(values.numel()) : 0);
  CopyBytes(whole.data(), values.data, stride == 1 ? Bytes(values) : 0, task_.device);
  if (finalised && stride == 1) {
    return whole;
  }
  std::vector<uint16_t> out;
  out.reserve(static_cast<size_t>(values.numel() / stride + hidden));
  std::vector<uint16_t> row(static_cast<size_t>(hidden));
  for (size_t r = 0; r < rows.size(); r += static_cast<size_t>(stride)) {
    const int64_t begin = rows[r] * hidden;
    if (rows[r] < 0) {
      std::fill(row.begin(), row.end(), uint16_t{0});
    } else if (stride == 1) {
      std::copy_n(whole.begin() + begin, hidden, row.begin());
    } else {
      CopyBytes(row.data(), values.as<const uint16_t>() + begin, 2 * hidden, task_.device);
    }
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

}  // namespace hopyard::tune
