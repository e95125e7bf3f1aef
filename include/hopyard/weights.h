// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "hopyard/quantize.h"
#include "hopyard/spec.h"
#include "hopyard/tensor.h"

namespace hopyard {

// Order of GEMM1's rows in a fused gate/up matrix. Ignored for activations that are not gated.
enum class RowOrder : uint8_t {
  kUpGate,             // rows [0, I) up, [I, 2I) gate
  kGateUp,             // gate first (Hugging Face checkpoints)
  kInterleavedGateUp,  // gate, up, gate, up ... (gpt-oss)
  kInterleavedUpGate,  // up, gate, ... (FlashInfer's prepared layout)
};

// Where row i of the order above is stored (spec 5.2).
enum class RowMap : uint8_t {
  kNatural,
  kShuffled128,  // FlashInfer shuffle_matrix_a with epilogue tile 128: blocks of 32 rows
  kShuffled64,   // epilogue tile 64: blocks of 16 rows
};

enum class MajorOrder : uint8_t {
  kKMajor,       // [rows, K]
  kMnMajor,      // [K, rows], BF16 only
  kBlockKMajor,  // [K / b, rows, b] with b = 128 bytes of K (FlashInfer BlockMajorK)
};

// One family of weight matrices, one matrix [rows, K] per expert. Either `values` is 3-D
// [experts, ...] with one stride, or `per_expert` holds a 2-D view (3-D for kBlockKMajor) per
// expert; scales likewise. 4-bit codes are kUint8 with two values a byte along K. A partial last
// scale block is allowed: scale columns = ceil((col_origin + K) / block).
struct MatrixSet {
  TensorView values;
  std::vector<TensorView> values_per_expert;
  TensorView
      scales;  // block scales of the format, or f32 per row (kFp8PerChannel: [experts, rows])
  std::vector<TensorView> scales_per_expert;
  TensorView global_scales;  // f32 [experts]: kFp8PerTensor scale, kNvFp4 multiplier 1/g; absent
                             // = 1. Finite; 0 makes every value of the expert 0
  TensorView bias;           // f32 or bf16 [experts, rows] in natural units and row order; optional
  std::vector<TensorView> bias_per_expert;
  MajorOrder major = MajorOrder::kKMajor;
  ScaleLayout scale_layout = ScaleLayout::kLinear;
  RowMap row_map = RowMap::kNatural;  // of values, scales and bias alike
  int64_t row_origin = 0;  // kFp8Block128: a shard's first row within its 128-row scale block
  int64_t col_origin = 0;  // its first column within its scale block

  [[nodiscard]] bool defined() const { return values.defined() || !values_per_expert.empty(); }
};

// The matrices of a group of experts: gemm1 fused, or gate and up apart; then gemm2.
struct ExpertMatrices {
  MatrixSet gemm1;  // [f * I, H] per expert, rows in `row_order`
  MatrixSet gate;   // [I, H]: instead of gemm1, together with `up`
  MatrixSet up;
  MatrixSet gemm2;  // [H, I]
  RowOrder row_order = RowOrder::kGateUp;
  // Static scales, finite and > 0, of the kFp8PerTensor and kNvFp4 activation formats; absent for
  // all others. Read by every Forward: value = code * scale.
  TensorView gemm1_input_scale;  // f32 [1], of hidden states
  TensorView gemm2_input_scale;  // f32 [1] or [experts], of the intermediate
  // Parameters of SwiGLU and SiTU, f32 [experts], read by every Forward in place of the spec's:
  // data, not looked at. Absent: the spec's.
  TensorView alpha;
  TensorView beta;
  TensorView limit;
};

struct WeightsDesc {
  uint32_t struct_size = sizeof(WeightsDesc);
  ExpertMatrices routed;              // local experts of the spec
  ExpertMatrices shared;              // spec.shared.count experts in spec.shared.weights
  bool read_only = false;             // the memory must not be written: Update refuses
  std::shared_ptr<const void> owner;  // keeps the memory alive (a mapped file); may be null
  // Of kMxFp4 and kNvFp4 weights on a GPU: Weights copies codes and block scales into memory of the
  // library's own, in the order in which its kernels are the fastest (docs/hopper.md), and reads
  // the copy from then on. The given ones may be freed or overwritten once Weights is constructed;
  // all else (biases, global scales, parameters) is read where it lies, as ever. Results are the
  // same bits, unless a plan has a kernel that divides K: its twin for packed weights does not.
  // Update writes into the copy. Other formats of the layer stay as they are; a layer without those
  // two, or weights on the CPU, are an Error.
  bool packed = false;
  // Keeps alive what `packed` makes dispensable: values and scales. Released then, unless shared
  // experts of another format are read from there as well; may be null.
  std::shared_ptr<const void> codes_owner;
};

// What of a matrix's layout has kernels of its own; K blocks, shuffled rows and the layouts of
// scales have not, all of these are kKMajor.
enum class ReadOrder : uint8_t {
  kKMajor,
  kMnMajor,
  kMnMajorInterleaved,  // gate and up in alternate columns
  kPacked,              // WeightsDesc::packed
};
[[nodiscard]] std::string_view ToString(ReadOrder order);

// Of a layer's weights; kKMajor of shared experts that are not there.
struct WeightOrders {
  ReadOrder gemm1 = ReadOrder::kKMajor;
  ReadOrder gemm2 = ReadOrder::kKMajor;
  ReadOrder shared_gemm1 = ReadOrder::kKMajor;
  ReadOrder shared_gemm2 = ReadOrder::kKMajor;

  friend bool operator==(const WeightOrders&, const WeightOrders&) = default;
};
[[nodiscard]] WeightOrders OrdersOf(const MoeSpec& spec, const WeightsDesc& desc);

// A copy in memory of `device`, which its `owner` holds: contiguous, MN-major matrices K-major. All
// tensors of `desc` lie in host memory; codes and scales are the `codes_owner`'s. Returns when the
// bytes have arrived.
[[nodiscard]] WeightsDesc CopyWeights(const WeightsDesc& desc, Device device);

// Part of an expert that Update writes.
enum class WeightPart : uint8_t { kGate, kUp, kGemm1, kGemm2 };

// A canonical slice: natural rows [row_begin, row_begin + rows) and columns [col_begin, ...) of one
// matrix, K-major, linear scales. kGemm1 addresses rows in the `row_order`
// of the matrices, before the row map. A slice with scales begins and ends on scale blocks or at
// the matrix's edges, and its scales are those of its values, no more and no fewer: a scale that
// governed anything else would change it unseen. Where gate and up rows share a 128-row block or a
// global scale, write kGemm1. A global scale other than the stored one comes with values of the
// whole matrix, or without values and scales.
struct WeightSlice {
  int64_t expert = 0;  // local slot; shared expert j is num_local_experts + j
  WeightPart part = WeightPart::kGemm1;
  int64_t row_begin = 0;
  int64_t col_begin = 0;
  TensorView values;        // [rows, cols] (packed columns for 4-bit codes); absent: unchanged
  TensorView scales;        // absent: unchanged
  TensorView bias;          // [rows] f32 or bf16; absent: unchanged
  TensorView global_scale;  // f32 [1]; absent: unchanged
};

// Weights of one layer. A view: it does not copy, the caller's memory must outlive it (or be held
// by WeightsDesc::owner). Safe to share between threads; Update must not run beside a Forward.
// All tensors lie on one device, that of the plans they are used with.
class Weights {
 public:
  Weights();  // empty; usable only as an assignment target
  // Checks every shape, dtype and layout against the spec; Error names the field, got and wanted.
  // On a GPU also allocates there what describes the weights to the kernels, and synchronises; a
  // layout that those cannot read is Error{kUnsupported}.
  Weights(const MoeSpec& spec, WeightsDesc desc);

  [[nodiscard]] const MoeSpec& spec() const;
  [[nodiscard]] const WeightsDesc& desc() const;
  [[nodiscard]] Device device() const;
  // Bytes of one expert's codes and scales: what a decode step reads per touched expert.
  [[nodiscard]] int64_t bytes_per_expert() const;
  // Writes a slice in place, in whatever layout the weights are stored (packed ones: into the
  // library's copy). Takes effect in the next
  // Forward; addresses do not change. On a GPU the writes are enqueued on `stream`, the slice's
  // tensors lie on the weights' device or on the host, and the call may synchronise.
  void Update(const WeightSlice& slice, Stream stream = {});

  struct Impl;
  [[nodiscard]] const Impl& impl() const;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace hopyard
