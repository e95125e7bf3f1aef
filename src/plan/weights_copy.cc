// SPDX-License-Identifier: Apache-2.0
// Weights from the host into two pieces of a device's memory: sizes first, then the bytes.
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "hopyard/device.h"
#include "hopyard/weights.h"

#include "core/error.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "plan/routing_layout.h"

namespace hopyard {
namespace {

struct Tensor {
  TensorView* view = nullptr;
  bool codes = false;      // or scales of codes: the `codes_owner`'s
  bool transpose = false;  // its last two dimensions change places
};

void AddTensors(MatrixSet* set, std::vector<Tensor>* tensors) {
  const bool transpose = set->major == MajorOrder::kMnMajor;
  tensors->push_back({&set->values, true, transpose});
  for (TensorView& view : set->values_per_expert) {
    tensors->push_back({&view, true, transpose});
  }
  tensors->push_back({&set->scales, true});
  for (TensorView& view : set->scales_per_expert) {
    tensors->push_back({&view, true});
  }
  for (TensorView* view : {&set->global_scales, &set->bias}) {
    tensors->push_back({view});
  }
  for (TensorView& view : set->bias_per_expert) {
    tensors->push_back({&view});
  }
}

// Those that are there.
std::vector<Tensor> TensorsOf(WeightsDesc* desc) {
  std::vector<Tensor> tensors;
  for (ExpertMatrices* group : {&desc->routed, &desc->shared}) {
    for (MatrixSet* set : {&group->gemm1, &group->gate, &group->up, &group->gemm2}) {
      AddTensors(set, &tensors);
    }
    for (TensorView* view : {&group->gemm1_input_scale, &group->gemm2_input_scale, &group->alpha,
                             &group->beta, &group->limit}) {
      tensors.push_back({view});
    }
  }
  std::erase_if(tensors, [](const Tensor& tensor) { return !tensor.view->defined(); });
  return tensors;
}

TensorView Transposed(TensorView view) {
  const auto last = static_cast<size_t>(view.ndim) - 1;
  std::swap(view.shape.at(last), view.shape.at(last - 1));
  std::swap(view.strides.at(last), view.strides.at(last - 1));
  return view;
}

TensorView MadeContiguous(TensorView view) {
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    const auto at = static_cast<size_t>(d);
    view.strides.at(at) = stride;
    stride *= view.shape.at(at);
  }
  return view;
}

template <class T>
void Gather(const TensorView& from, T* to) {
  const int64_t cols = from.shape.at(static_cast<size_t>(from.ndim) - 1);
  const int64_t step = from.strides.at(static_cast<size_t>(from.ndim) - 1);
  const int64_t rows = cols == 0 ? 0 : from.numel() / cols;
  ParallelFor(0, rows, 1, MaxThreads(), [&](int64_t row, int) {
    int64_t offset = 0;
    int64_t rest = row;
    for (int d = from.ndim - 2; d >= 0; --d) {
      const auto at = static_cast<size_t>(d);
      offset += rest % from.shape.at(at) * from.strides.at(at);
      rest /= from.shape.at(at);
    }
    const T* const source = from.as<const T>() + offset;
    for (int64_t c = 0; c < cols; ++c) {
      to[row * cols + c] = source[c * step];
    }
  });
}

// The elements in row-major order, in host memory.
std::vector<uint8_t> Compacted(const TensorView& view) {
  const int64_t size = SizeOf(view.dtype);
  std::vector<uint8_t> bytes(static_cast<size_t>(view.numel() * size));
  void* const to = bytes.data();
  if (size == 1) {
    Gather(view, static_cast<uint8_t*>(to));
  } else if (size == 2) {
    Gather(view, static_cast<uint16_t*>(to));
  } else {
    HOPYARD_INTERNAL(size == 4) << "weights have elements of " << size << " bytes";
    Gather(view, static_cast<uint32_t*>(to));
  }
  return bytes;
}

}  // namespace

WeightsDesc CopyWeights(const WeightsDesc& desc, Device device) {
  WeightsDesc copy = desc;
  const std::vector<Tensor> tensors = TensorsOf(&copy);
  int64_t bytes[2] = {0, 0};  // of codes, and of the others
  for (const Tensor& tensor : tensors) {
    const TensorView& view = *tensor.view;
    HOPYARD_CHECK(view.device.kind == DeviceKind::kCpu, kInvalidArgument)
        << "weights are on cuda:" << view.device.index
        << "; wanted host memory: copy them from where they were loaded";
    bytes[tensor.codes ? 0 : 1] += RoundUp(view.numel() * SizeOf(view.dtype), kWorkspaceAlignment);
  }
  const auto codes = std::make_shared<const DeviceMemory>(device, bytes[0]);
  const auto others = std::make_shared<const DeviceMemory>(device, bytes[1]);
  uint8_t* places[2] = {static_cast<uint8_t*>(codes->data()),
                        static_cast<uint8_t*>(others->data())};
  for (const Tensor& tensor : tensors) {
    uint8_t*& next = places[tensor.codes ? 0 : 1];
    const TensorView source = tensor.transpose ? Transposed(*tensor.view) : *tensor.view;
    const int64_t size = source.numel() * SizeOf(source.dtype);
    if (source.is_contiguous()) {
      CopyBytes(next, source.data, size, device);
    } else {
      CopyBytes(next, Compacted(source).data(), size, device);
    }
    *tensor.view = MadeContiguous(source);
    tensor.view->data = next;
    tensor.view->device = device;
    next += RoundUp(size, kWorkspaceAlignment);
  }
  for (ExpertMatrices* group : {&copy.routed, &copy.shared}) {
    for (MatrixSet* set : {&group->gemm1, &group->gate, &group->up, &group->gemm2}) {
      set->major = set->major == MajorOrder::kMnMajor ? MajorOrder::kKMajor : set->major;
    }
  }
  copy.read_only = false;
  copy.owner = others;
  copy.codes_owner = codes;
  return copy;
}

}  // namespace hopyard
