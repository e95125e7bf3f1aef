// SPDX-License-Identifier: Apache-2.0
// Weight descriptions spoilt one field at a time, and updates that must not be written.
#include <cstring>
#include <limits>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "plan/backend_sm90.h"
#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

using W = WeightFormat;
using A = ActivationFormat;

struct Setup {
  const char* name;
  MoeSpec spec;
  WeightLayout layout;
  bool parameters = false;
};

std::ostream& operator<<(std::ostream& out, const Setup& setup) {
  return out << setup.name;
}

WeightSource SourceWith(const Setup& setup) {
  WeightSource source = SourceOf(setup.spec);
  source.layout = setup.layout;
  source.bias = true;
  source.parameter_tensors = setup.parameters;
  return source;
}

WeightLayout Layout(bool separate, bool per_expert) {
  WeightLayout layout;
  layout.separate = separate;
  layout.per_expert = per_expert;
  return layout;
}

std::vector<Setup> Setups() {
  MoeSpec shared = TinySpec(W::kMxFp4, A::kMxFp8);
  shared.shared.count = 2;
  shared.shared.weights = W::kMxFp8;
  MoeSpec plain = TinySpec(W::kFp8Block128, A::kBf16);
  plain.activation.kind = ActivationKind::kRelu2;
  WeightLayout blocked = Layout(false, false);
  blocked.major = MajorOrder::kBlockKMajor;
  MoeSpec wide = TinySpec();
  wide.intermediate_size = 64;
  WeightLayout transposed = Layout(false, true);
  transposed.major = MajorOrder::kMnMajor;
  return {{"Bf16Stacked", TinySpec(), Layout(false, false)},
          {"Bf16BlockMajorK", wide, blocked},
          {"Bf16MnMajorPerExpert", TinySpec(), transposed},
          {"NvFp4ApartPerExpert", TinySpec(W::kNvFp4, A::kNvFp4), Layout(true, true)},
          {"Fp8PerTensorApart", TinySpec(W::kFp8PerTensor, A::kFp8PerTensor), Layout(true, false)},
          {"Fp8PerChannel", TinySpec(W::kFp8PerChannel, A::kFp8PerToken), Layout(false, false)},
          {"Fp8BlockNotGated", plain, Layout(false, false)},
          {"MxInt4PerExpert", TinySpec(W::kMxInt4, A::kBf16), Layout(false, true)},
          {"MxFp4WithSharedMxFp8", shared, Layout(false, false)},
          {"MxFp4WithSharedAndParameters", shared, Layout(false, false), true}};
}

// A view of the description and the name that errors give it.
struct Field {
  std::string name;
  TensorView* view;
  bool per_expert = false;
  bool contiguous = false;  // every stride is fixed, not just the inner one
  bool vector_scales = false;
};

void AddSet(const std::string& name, MatrixSet* set, bool per_channel, std::vector<Field>* out) {
  const auto add = [&](const char* field, TensorView* all, std::vector<TensorView>* each,
                       bool contiguous, bool vector_scales) {
    if (all->defined()) {
      out->push_back({name + field, all, false, contiguous, vector_scales});
    } else if (!each->empty()) {
      out->push_back({name + field, &each->back(), true, contiguous, vector_scales});
    }
  };
  std::vector<TensorView> none;
  add(".values", &set->values, &set->values_per_expert, false, false);
  add(".scales", &set->scales, &set->scales_per_expert, false, per_channel);
  add(".bias", &set->bias, &set->bias_per_expert, true, false);
  add(".global_scales", &set->global_scales, &none, true, false);
}

std::vector<Field> FieldsOf(const MoeSpec& spec, WeightsDesc* desc) {
  std::vector<Field> fields;
  const auto group = [&](const std::string& name, ExpertMatrices* matrices, WeightFormat format) {
    const bool per_channel = format == W::kFp8PerChannel;
    AddSet(name + ".gemm1", &matrices->gemm1, per_channel, &fields);
    AddSet(name + ".gate", &matrices->gate, per_channel, &fields);
    AddSet(name + ".up", &matrices->up, per_channel, &fields);
    AddSet(name + ".gemm2", &matrices->gemm2, per_channel, &fields);
    if (matrices->gemm1_input_scale.defined()) {
      fields.push_back({name + ".gemm1_input_scale", &matrices->gemm1_input_scale, false, true});
      fields.push_back({name + ".gemm2_input_scale", &matrices->gemm2_input_scale, false, true});
    }
    if (matrices->alpha.defined()) {
      fields.push_back({name + ".alpha", &matrices->alpha, false, true});
      fields.push_back({name + ".beta", &matrices->beta, false, true});
      fields.push_back({name + ".limit", &matrices->limit, false, true});
    }
  };
  group("weights.routed", &desc->routed, spec.weights);
  group("weights.shared", &desc->shared, spec.shared.weights);
  return fields;
}

std::vector<TensorView> SpoiltShapes(const Field& field) {
  const TensorView& good = *field.view;
  std::vector<TensorView> bad;
  std::vector<int64_t> shape(good.shape.begin(), good.shape.begin() + good.ndim);
  if (!field.vector_scales && good.ndim < TensorView::kMaxDims) {
    // Per-row scales may be [rows] or [rows, 1].
    std::vector<int64_t> longer = shape;
    longer.push_back(1);
    bad.push_back(Reshaped(good, longer));
  }
  if (good.ndim > 1) {
    bad.push_back(Reshaped(good, {good.numel()}));
  }
  for (const int ndim : {TensorView::kMaxDims + 1, -1}) {
    bad.push_back(good);
    bad.back().ndim = ndim;
  }
  const bool one_or_all = field.name.find("gemm2_input_scale") != std::string::npos;
  for (int dim = 0; dim < good.ndim; ++dim) {
    const int64_t extent = good.shape.at(static_cast<size_t>(dim));
    for (const int64_t wrong : {extent + 1, extent - 1, -extent, int64_t{1} << 62}) {
      if (!(one_or_all && wrong == 1)) {
        std::vector<int64_t> changed = shape;
        changed[static_cast<size_t>(dim)] = wrong;
        bad.push_back(Reshaped(good, changed));
      }
    }
  }
  return bad;
}

std::vector<TensorView> SpoiltMemory(const Field& field) {
  const TensorView& good = *field.view;
  std::vector<TensorView> bad;
  for (const DType dtype : {DType::kFloat64, DType::kInt8, DType::kFp16}) {
    bad.push_back(WithDType(good, dtype));
  }
  bad.push_back(good);
  bad.back().data = nullptr;
  // In a build for GPUs GEMM2's values say where the weights are: then the others are misplaced.
  const bool places_all = field.name.find("routed.gemm2.values") != std::string::npos;
  if (sm90::FindBackend() == nullptr || !places_all) {
    bad.push_back(good);
    bad.back().device.kind = DeviceKind::kCuda;
  }
  if (SizeOf(good.dtype) > 1) {
    bad.push_back(good);
    bad.back().data = good.as<uint8_t>() + 1;
  }
  // Strides of the experts are free; those of rows may only grow; the innermost is 1.
  const int first = field.per_expert || field.name.find("_scale") != std::string::npos ? 0 : 1;
  for (int dim = first; dim < good.ndim && !field.vector_scales; ++dim) {
    if (good.shape.at(static_cast<size_t>(dim)) > 1) {
      bad.push_back(good);
      bad.back().strides.at(static_cast<size_t>(dim)) -= 1;
    }
  }
  if (good.shape.at(static_cast<size_t>(good.ndim - 1)) > 1 && !field.vector_scales) {
    bad.push_back(good);
    bad.back().strides.at(static_cast<size_t>(good.ndim - 1)) = 2;
  }
  return bad;
}

class SpoiltWeights : public ::testing::TestWithParam<Setup> {
 protected:
  SpoiltWeights() : stored_(SourceWith(GetParam())) {}
  LayerWeights stored_;
};

INSTANTIATE_TEST_SUITE_P(AllFormats, SpoiltWeights, ::testing::ValuesIn(Setups()),
                         [](const ::testing::TestParamInfo<Setup>& param) {
                           return param.param.name;
                         });

TEST_P(SpoiltWeights, EveryTensorInEveryWay) {
  const MoeSpec& spec = GetParam().spec;
  WeightsDesc good = stored_.desc();
  const std::vector<Field> fields = FieldsOf(spec, &good);
  ASSERT_GE(fields.size(), 4U);
  for (size_t i = 0; i < fields.size(); ++i) {
    std::vector<TensorView> all = SpoiltShapes(fields[i]);
    const std::vector<TensorView> memory = SpoiltMemory(fields[i]);
    all.insert(all.end(), memory.begin(), memory.end());
    for (size_t k = 0; k < all.size(); ++k) {
      SCOPED_TRACE(fields[i].name + ", way " + std::to_string(k));
      WeightsDesc bad = stored_.desc();
      *FieldsOf(spec, &bad)[i].view = all[k];
      ExpectInvalid([&] { const Weights weights(spec, bad); }, {fields[i].name, "want"});
      if (HasFailure()) {
        return;
      }
    }
  }
  EXPECT_NO_THROW(Weights(spec, good));
}

TEST_P(SpoiltWeights, RequiredTensorsMissing) {
  const MoeSpec& spec = GetParam().spec;
  WeightsDesc good = stored_.desc();
  const std::vector<Field> fields = FieldsOf(spec, &good);
  for (size_t i = 0; i < fields.size(); ++i) {
    const auto ends = [&](const std::string& end) {
      return fields[i].name.size() > end.size() &&
             fields[i].name.compare(fields[i].name.size() - end.size(), end.size(), end) == 0;
    };
    if (ends(".bias") || ends(".global_scales") || ends(".alpha") || ends(".beta") ||
        ends(".limit")) {
      continue;
    }
    SCOPED_TRACE(fields[i].name);
    WeightsDesc bad = stored_.desc();
    *FieldsOf(spec, &bad)[i].view = TensorView{};
    // Without its values gemm1 is absent as a whole; an expert's own absent view is a null pointer.
    const std::string wanted = fields[i].per_expert    ? fields[i].name + "["
                               : ends(".gemm1.values") ? "has neither gemm1 nor gate and up"
                                                       : fields[i].name + " is missing";
    ExpectInvalid([&] { const Weights weights(spec, bad); }, {wanted});
  }
}

TEST_P(SpoiltWeights, LayoutsThatDoNotExist) {
  const MoeSpec& spec = GetParam().spec;
  const auto refused = [&](const std::function<void(WeightsDesc*)>& spoil,
                           const std::vector<std::string>& parts) {
    WeightsDesc bad = stored_.desc();
    spoil(&bad);
    ExpectInvalid([&] { const Weights weights(spec, bad); }, parts);
  };
  refused([](WeightsDesc* d) { d->routed.gemm2.major = static_cast<MajorOrder>(3); },
          {"weights.routed.gemm2.major=3", "wanted 0 .. 2"});
  refused([](WeightsDesc* d) { d->routed.gemm2.row_map = static_cast<RowMap>(9); },
          {"weights.routed.gemm2.row_map=9", "wanted 0 .. 2"});
  refused([](WeightsDesc* d) { d->routed.gemm2.scale_layout = static_cast<ScaleLayout>(7); },
          {"weights.routed.gemm2.scale_layout=7", "wanted 0 .. 1"});
  refused([](WeightsDesc* d) { d->routed.row_order = static_cast<RowOrder>(4); },
          {"weights.routed.row_order=4", "wanted 0 .. 3"});
  refused([](WeightsDesc* d) { d->struct_size = 16; }, {"WeightsDesc.struct_size=16", "headers"});
  refused([](WeightsDesc* d) { d->routed.gemm2.row_origin = -1; },
          {"weights.routed.gemm2.row_origin=-1", "wanted 0 .. "});
  refused([](WeightsDesc* d) { d->routed.gemm2.col_origin = 4096; },
          {"weights.routed.gemm2.col_origin=4096", "wanted 0 .. "});
}

class BadWeights : public ::testing::Test {
 protected:
  static WeightsDesc Spoilt(const LayerWeights& stored,
                            const std::function<void(WeightsDesc*)>& spoil) {
    WeightsDesc desc = stored.desc();
    spoil(&desc);
    return desc;
  }
};

TEST_F(BadWeights, Row12And13ExtentsOfBothMatrices) {
  const MoeSpec spec = TinySpec();
  const LayerWeights stored(SourceOf(spec));
  const auto with_shape = [&](bool first, const std::vector<int64_t>& shape) {
    return Spoilt(stored, [&](WeightsDesc* d) {
      MatrixSet& set = first ? d->routed.gemm1 : d->routed.gemm2;
      set.values = Reshaped(set.values, shape);
    });
  };
  ExpectInvalid(
      [&] {
        Weights(spec, with_shape(true, {4, 63, 64}));
      },
      {"weights.routed.gemm1.values of one expert", "[63, 64]", "wanted [64, 64]"});
  ExpectInvalid(
      [&] {
        Weights(spec, with_shape(true, {4, 64, 32}));
      },
      {"weights.routed.gemm1.values", "[64, 32]", "wanted [64, 64]"});
  ExpectInvalid(
      [&] {
        Weights(spec, with_shape(false, {4, 64, 31}));
      },
      {"weights.routed.gemm2.values", "[64, 31]", "wanted [64, 32]"});
  // Not checked by FlashInfer: local experts against the first dimension.
  ExpectInvalid(
      [&] {
        Weights(spec, with_shape(true, {3, 64, 64}));
      },
      {"weights.routed.gemm1.values has shape [3, 64, 64]", "wanted 4 local experts"});
}

TEST_F(BadWeights, Row14MnMajorIsForBf16) {
  const MoeSpec spec = TinySpec(W::kMxFp8, A::kMxFp8);
  const LayerWeights stored(SourceOf(spec));
  ExpectUnsupported(
      [&] {
        Weights(spec, Spoilt(stored,
                             [](WeightsDesc* d) { d->routed.gemm1.major = MajorOrder::kMnMajor; }));
      },
      {"weights.routed.gemm1 is MN-major", "only bf16", "store mxfp8 K-major"});
}

TEST_F(BadWeights, BlockMajorKAndShuffledRowsNeedWholeBlocks) {
  MoeSpec spec = TinySpec();  // intermediate 32: gemm2 has half a block of 64
  const LayerWeights stored(SourceOf(spec));
  ExpectInvalid(
      [&] {
        Weights(spec, Spoilt(stored, [](WeightsDesc* d) {
                  d->routed.gemm2.major = MajorOrder::kBlockKMajor;
                }));
      },
      {"weights.routed.gemm2", "multiple of 64", "got 32", "store it K-major"});
  spec.hidden_size = 40;
  const LayerWeights narrow(SourceOf(spec));
  ExpectInvalid(
      [&] {
        Weights(spec, Spoilt(narrow, [](WeightsDesc* d) {
                  d->routed.gemm2.row_map = RowMap::kShuffled128;
                }));
      },
      {"weights.routed.gemm2 has 40 rows", "blocks of 32", "zero-pad"});
}

TEST_F(BadWeights, Row11And53CodesOfAnotherType) {
  const struct {
    WeightFormat format;
    const char* wanted;
  } cases[] = {{W::kBf16, "bf16 wants bf16"},    {W::kFp8Block128, "fp8_block128 wants e4m3"},
               {W::kMxFp8, "mxfp8 wants e4m3"},  {W::kNvFp4, "nvfp4 wants u8"},
               {W::kMxFp4, "mxfp4 wants u8"},    {W::kMxInt4, "mxint4 wants u8"},
               {W::kFp8PerTensor, "wants e4m3"}, {W::kFp8PerChannel, "wants e4m3"}};
  for (const auto& c : cases) {
    SCOPED_TRACE(c.wanted);
    const MoeSpec spec = TinySpec(c.format, A::kBf16);
    const LayerWeights stored(SourceOf(spec));
    ExpectInvalid(
        [&] {
          Weights(spec, Spoilt(stored, [](WeightsDesc* d) {
                    d->routed.gemm1.values.dtype = DType::kFloat32;
                  }));
        },
        {"weights.routed.gemm1.values is f32", c.wanted});
  }
}

TEST_F(BadWeights, Row17And18And52And54Scales) {
  const struct {
    WeightFormat format;
    DType wrong;
    const char* wanted;
    const char* shape;  // of gemm1's scales of one expert
  } cases[] = {{W::kFp8Block128, DType::kBf16, "fp8_block128 wants f32", "wanted [1, 1]"},
               {W::kMxFp8, DType::kFloat32, "mxfp8 wants e8m0", "wanted [64, 2]"},
               {W::kMxFp4, DType::kE4m3, "mxfp4 wants e8m0", "wanted [64, 2]"},
               {W::kNvFp4, DType::kE8m0, "nvfp4 wants e4m3", "wanted [64, 4]"},
               {W::kMxInt4, DType::kFloat32, "mxint4 wants bf16", "wanted [64, 2]"},
               {W::kFp8PerChannel, DType::kBf16, "fp8_per_channel wants f32", "wanted [64]"}};
  for (const auto& c : cases) {
    SCOPED_TRACE(c.wanted);
    const MoeSpec spec = TinySpec(c.format, A::kBf16);
    const LayerWeights stored(SourceOf(spec));
    const auto dtype = [&](WeightsDesc* d) { d->routed.gemm1.scales.dtype = c.wrong; };
    ExpectInvalid([&] { Weights(spec, Spoilt(stored, dtype)); },
                  {"weights.routed.gemm1.scales is " + std::string(ToString(c.wrong)), c.wanted});
    const auto extent = [](WeightsDesc* d) {
      TensorView& scales = d->routed.gemm1.scales;
      scales = Reshaped(scales, {4, 3, 3});
    };
    ExpectInvalid([&] { Weights(spec, Spoilt(stored, extent)); },
                  {"weights.routed.gemm1.scales", "[3, 3]", c.shape});
  }
}

TEST_F(BadWeights, SwizzledScalesOfTheWrongSize) {
  MoeSpec spec = TinySpec(W::kNvFp4, A::kBf16);
  const LayerWeights stored(SourceOf(spec));
  const auto swizzled = [](WeightsDesc* d) {
    d->routed.gemm1.scale_layout = ScaleLayout::kSwizzled128x4;
  };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, swizzled)); },
                {"weights.routed.gemm1.scales", "256 elements", "[64, 4] has 512"});
  spec.weights = W::kFp8PerChannel;
  const LayerWeights per_row(SourceOf(spec));
  ExpectUnsupported([&] { Weights(spec, Spoilt(per_row, swizzled)); },
                    {"weights.routed.gemm1.scales of fp8_per_channel", "store these linear"});
}

TEST_F(BadWeights, FieldsThatTheFormatDoesNotHave) {
  const MoeSpec spec = TinySpec();
  const LayerWeights stored(SourceOf(spec));
  std::vector<float> memory(4096, 1.0F);
  const auto scales = [&](WeightsDesc* d) {
    d->routed.gemm2.scales = TensorView::Contiguous(memory.data(), DType::kFloat32, {4, 64, 1});
  };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, scales)); },
                {"weights.routed.gemm2.scales is given", "bf16 has no such scales"});
  const auto global = [&](WeightsDesc* d) {
    d->routed.gemm2.global_scales = TensorView::Contiguous(memory.data(), DType::kFloat32, {4});
  };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, global)); },
                {"weights.routed.gemm2.global_scales is given", "bf16 has none"});
}

TEST_F(BadWeights, Row48StaticActivationScales) {
  for (const MoeSpec& spec :
       {TinySpec(W::kNvFp4, A::kNvFp4), TinySpec(W::kFp8PerTensor, A::kFp8PerTensor)}) {
    const LayerWeights stored(SourceOf(spec));
    const std::string name(ToString(spec.activations));
    ExpectInvalid(
        [&] {
          Weights(spec, Spoilt(stored, [](WeightsDesc* d) { d->routed.gemm1_input_scale = {}; }));
        },
        {"weights.routed.gemm1_input_scale is missing", name, "static scale", "f32 [1]"});
    ExpectInvalid(
        [&] {
          Weights(spec, Spoilt(stored, [](WeightsDesc* d) { d->routed.gemm2_input_scale = {}; }));
        },
        {"weights.routed.gemm2_input_scale is missing", name, "f32 [1] or [4]"});
    ExpectInvalid(
        [&] {
          Weights(spec, Spoilt(stored, [](WeightsDesc* d) {
                    TensorView& scale = d->routed.gemm2_input_scale;
                    scale = Reshaped(scale, {3});
                  }));
        },
        {"weights.routed.gemm2_input_scale has shape [3]", "wanted [4]"});
  }
}

TEST_F(BadWeights, Row41SharedExperts) {
  MoeSpec spec = TinySpec(W::kNvFp4, A::kNvFp4);
  spec.shared.count = 2;
  spec.shared.weights = W::kNvFp4;
  const LayerWeights stored(SourceOf(spec));
  const auto drop = [](WeightsDesc* d) { d->shared = {}; };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, drop)); },
                {"weights.shared has neither gemm1 nor gate and up"});
  // Extents of the routed experts alone.
  const auto routed = [](WeightsDesc* d) { d->shared.gemm2 = d->routed.gemm2; };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, routed)); },
                {"weights.shared.gemm2.values has shape [4, ", "wanted 2 local experts"});
  const auto scale = [](WeightsDesc* d) { *d->shared.gemm1_input_scale.as<float>() *= 2.0F; };
  const float right = *stored.desc().shared.gemm1_input_scale.as<float>();
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, scale)); },
                {"weights.shared.gemm1_input_scale holds", "the routed experts' scale"});
  *stored.desc().shared.gemm1_input_scale.as<float>() = right;
  EXPECT_NO_THROW(stored.Make());
  MoeSpec none = spec;
  none.shared.count = 0;
  ExpectInvalid([&] { Weights(none, stored.desc()); },
                {"weights.shared is given", "spec.shared.count=0"});
}

TEST_F(BadWeights, TwoDescriptionsOfOneMatrix) {
  const MoeSpec spec = TinySpec();
  const LayerWeights stored(SourceOf(spec));
  const auto both = [](WeightsDesc* d) { d->routed.gate = d->routed.gemm1; };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, both)); },
                {"weights.routed has both gemm1 and gate/up", "give one"});
  const auto list = [](WeightsDesc* d) {
    d->routed.gemm2.values_per_expert.assign(4, d->routed.gemm2.values);
  };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, list)); },
                {"weights.routed.gemm2.values is given both as one tensor and per expert"});
  const auto short_list = [](WeightsDesc* d) {
    d->routed.gemm2.values_per_expert.assign(3, d->routed.gemm2.values);
    d->routed.gemm2.values = {};
  };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, short_list)); },
                {"weights.routed.gemm2.values has 3 per-expert tensors", "wanted 4"});
  const auto half = [](WeightsDesc* d) {
    d->routed.gate = d->routed.gemm2;
    d->routed.gemm1 = {};
  };
  ExpectInvalid([&] { Weights(spec, Spoilt(stored, half)); }, {"weights.routed.gate.values"});
  MoeSpec plain = spec;
  plain.activation.kind = ActivationKind::kSilu;
  ExpectInvalid([&] { Weights(plain, Spoilt(stored, half)); },
                {"weights.routed has gate and up", "silu is not gated", "give gemm1"});
}

TEST_F(BadWeights, EmptyWeightsAreRefused) {
  ExpectInvalid([] { std::ignore = Weights().spec(); }, {"weights are empty", "construct"});
  ExpectInvalid([] { std::ignore = Weights().desc(); }, {"weights are empty"});
  ExpectInvalid([] { std::ignore = &Weights().impl(); }, {"weights are empty"});
  ExpectInvalid([] { std::ignore = Weights().bytes_per_expert(); }, {"weights are empty"});
  ExpectInvalid([] { Weights().Update(WeightSlice{}); }, {"weights are empty"});
}

class BadUpdate : public ::testing::Test {
 protected:
  BadUpdate() : stored_(SourceOf(spec_)), weights_(stored_.Make()), memory_(1 << 14, 0) {
    slice_.part = WeightPart::kGemm2;
    slice_.values = Values(DType::kE4m3, {64, 32});
  }
  TensorView Values(DType dtype, std::initializer_list<int64_t> shape) {
    return TensorView::Contiguous(memory_.data(), dtype, shape);
  }
  void Refused(const WeightSlice& slice, const std::vector<std::string>& parts) {
    const TensorView& values = stored_.desc().routed.gemm2.values;
    const std::vector<uint8_t> before(values.as<uint8_t>(), values.as<uint8_t>() + values.numel());
    ExpectInvalid([&] { weights_.Update(slice); }, parts);
    EXPECT_EQ(std::memcmp(before.data(), values.data, before.size()), 0) << "the slice was written";
  }

  MoeSpec spec_ = TinySpec(W::kMxFp8, A::kBf16);
  LayerWeights stored_;
  Weights weights_;
  std::vector<uint8_t> memory_;
  WeightSlice slice_;
};

TEST_F(BadUpdate, TargetsThatDoNotExist) {
  for (const int64_t expert : {int64_t{-1}, int64_t{4}}) {
    WeightSlice bad = slice_;
    bad.expert = expert;
    Refused(bad, {"slice.expert=" + std::to_string(expert), "wanted 0 .. 3"});
  }
  for (const int64_t begin : {int64_t{-32}, int64_t{32}}) {
    WeightSlice bad = slice_;
    bad.row_begin = begin;
    Refused(bad, {"slice rows [" + std::to_string(begin), "not within [64, 32]"});
    bad = slice_;
    bad.col_begin = begin;
    Refused(bad, {"columns [" + std::to_string(begin), "not within [64, 32]"});
  }
}

TEST_F(BadUpdate, TensorsOfAnotherShapeOrType) {
  WeightSlice bad = slice_;
  bad.values.dtype = DType::kBf16;
  Refused(bad, {"slice.values is bf16", "wanted a matrix of e4m3"});
  bad = slice_;
  bad.values = Values(DType::kE4m3, {65, 32});
  Refused(bad, {"slice rows [0, 65)", "[64, 32]"});
  bad = slice_;
  bad.values = {};
  bad.scales = Values(DType::kFloat32, {64, 1});
  Refused(bad, {"slice.scales is f32", "wanted e8m0"});
  bad.scales = Values(DType::kE8m0, {64, 1});
  bad.col_begin = 8;
  Refused(bad, {"column 8", "scale block of 1 x 32", "block boundary"});
  bad = slice_;
  bad.values = {};
  bad.bias = Values(DType::kFloat32, {64});
  Refused(bad, {"slice.bias is given", "no bias"});
  bad.bias = {};
  bad.global_scale = Values(DType::kFloat32, {1});
  Refused(bad, {"slice.global_scale is given", "no global scales"});
}

TEST_F(BadUpdate, ReadOnlyWeights) {
  stored_.mutable_desc()->read_only = true;
  Weights mapped = stored_.Make();
  ExpectInvalid([&] { mapped.Update(slice_); }, {"read-only view", "memory of your own"});
}

TEST_F(BadUpdate, PartsThatTheLayerDoesNotHave) {
  MoeSpec plain = spec_;
  plain.activation.kind = ActivationKind::kRelu2;
  Weights weights = LayerWeights(SourceOf(plain)).Make();
  WeightSlice bad = slice_;
  bad.part = WeightPart::kGate;
  ExpectInvalid([&] { weights.Update(bad); }, {"gate or up", "relu2 is not gated", "kGemm1"});
  WeightSource apart = SourceOf(spec_);
  apart.layout.separate = true;
  const LayerWeights stored(apart);
  Weights separate = stored.Make();
  bad.part = WeightPart::kGemm1;
  ExpectInvalid([&] { separate.Update(bad); }, {"slice.part is gemm1", "gate and up apart"});
}

}  // namespace
}  // namespace hopyard::test
