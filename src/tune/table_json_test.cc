// SPDX-License-Identifier: Apache-2.0
// Text that is no table is refused, and says why.
#include <fstream>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

TuningTable ATable() {
  TuningTable table(AMachine());
  table.Put(ALayer(1));
  table.Put(ALayer(2));
  return table;
}

std::string Replaced(std::string text, const std::string& what, const std::string& with) {
  const size_t at = text.find(what);
  EXPECT_NE(at, std::string::npos) << what;
  return text.replace(at, what.size(), with);
}

TEST(TableJson, RoundTrip) {
  for (const TuningTable& table : {TuningTable(), TuningTable(AMachine()), ATable()}) {
    const std::string text = table.ToJson();
    EXPECT_EQ(TuningTable::FromJson(text), table);
    EXPECT_EQ(TuningTable::FromJson(text).ToJson(), text);
  }
}

TEST(TableJson, IsReadable) {
  TuningTable table(AMachine());
  TunedLayer layer = ALayer(0);
  table.Put(layer);
  EXPECT_EQ(table.ToJson(),
            R"({
  "format": "hopyard tuning table",
  "version": 2,
  "machine": {"device": "A processor", "units": 8, "isa": "avx2", "library": "0.1.0"},
  "layers": [
    {
      "key": {"hidden_size": 64, "intermediate_size": 0, "num_experts": 0, "local_experts": 0, )"
            R"("local": "all", "top_k": 0, "routing.score": "logit", )"
            R"("routing.weight": "softmax_selected", "routing.renormalise": "none", )"
            R"("routing.use_bias": false, "routing.num_groups": 1, "routing.top_groups": 1, )"
            R"("routing.scaling_factor": 2.6, "activation": "swiglu", "weights": "bf16", )"
            R"("activations": "bf16", "shared.count": 0, "shared.per_token_weight": false, )"
            R"("shared.weight": 1, "shared.weights": "bf16", "router_weight_on_input": false, )"
            R"("overlap_launches": false, "path.ids": false, "path.unfinalised": false, )"
            R"("path.replay": false, "weight_orders.gemm1": "k_major", )"
            R"("weight_orders.gemm2": "k_major", "weight_orders.shared_gemm1": "k_major", )"
            R"("weight_orders.shared_gemm2": "k_major"},
      "routing": "uniform,zipf",
      "ranges": [
        {"last": 16, "tokens": 8, "tactic": "tactic_a", "us": 12.5, "untuned": "tactic_b", )"
            R"("untuned_us": 13.25, "noise": 0.001},
        {"last": 300, "tokens": 256, "tactic": "tactic_b", "us": 99.1, "untuned": "tactic_b", )"
            R"("untuned_us": 99.1, "noise": 0}
      ],
      "faults": [
        {"tactic": "tactic_c", "tokens": 8, "reason": "ran out of \"memory\"\n"}
      ]
    }
  ]
}
)");
}

// Tests run in the root of the sources.
TEST(TableJson, TheDocumentedExample) {
  std::ifstream file("docs/tuning.md");
  std::ostringstream page;
  page << file.rdbuf();
  const std::string text = page.str();
  const std::string fence = "```json\n";
  const size_t begin = text.find(fence);
  ASSERT_NE(begin, std::string::npos);
  const size_t first = begin + fence.size();
  const std::string example = text.substr(first, text.find("```", first) - first);
  EXPECT_EQ(TuningTable::FromJson(example).ToJson(), example);
}

TEST(TableJson, BytesThatAreNoTextDoNotStopIt) {
  TunedLayer layer = ALayer(1);
  layer.faults[0].reason = "driver said \xFF\xFE";
  TuningTable table(AMachine());
  table.Put(layer);
  const TuningTable read = TuningTable::FromJson(table.ToJson());
  EXPECT_EQ(read.layers()[0].faults[0].reason, "driver said \xEF\xBF\xBD\xEF\xBF\xBD");
}

TEST(TableJson, TruncatedAnywhere) {
  const std::string text = ATable().ToJson();
  for (size_t size = 0; size + 2 < text.size();
       ++size) {  // the last two are the brace and a newline
    ExpectError(ErrorKind::kInvalidArgument, {"tuning table: is not JSON at byte "},
                [&] { std::ignore = TuningTable::FromJson(text.substr(0, size)); });
  }
}

TEST(TableJson, OfALaterFormat) {
  ExpectError(ErrorKind::kInvalidArgument,
              {"version 3; this library knows 2", "use the newer library"}, [] {
                // What it holds beside the version is not looked at.
                std::ignore = TuningTable::FromJson(
                    R"({"format": "hopyard tuning table", "version": 3, "other": []})");
              });
}

// They had no order of weights, and none but K-major was told apart.
TEST(TableJson, OfTheFirstFormat) {
  const std::string orders =
      R"(, "weight_orders.gemm1": "k_major", "weight_orders.gemm2": "k_major", )"
      R"("weight_orders.shared_gemm1": "k_major", "weight_orders.shared_gemm2": "k_major")";
  TuningTable table(AMachine());
  table.Put(ALayer(1));
  const std::string second = table.ToJson();
  const std::string first =
      Replaced(Replaced(second, orders, ""), "\"version\": 2", "\"version\": 1");
  EXPECT_EQ(TuningTable::FromJson(first), table);
  // Each version has its own fields and no other.
  for (const std::string& text : {Replaced(first, "\"version\": 1", "\"version\": 2"),
                                  Replaced(second, "\"version\": 2", "\"version\": 1")}) {
    ExpectError(ErrorKind::kInvalidArgument, {"layers[0].key"},
                [&] { std::ignore = TuningTable::FromJson(text); });
  }
}

TEST(TableJson, OtherJson) {
  const auto refused = [](const std::string& what, const std::string& with,
                          const std::vector<std::string>& parts) {
    ExpectError(ErrorKind::kInvalidArgument, parts, [&] {
      std::ignore = TuningTable::FromJson(Replaced(ATable().ToJson(), what, with));
    });
  };
  ExpectError(ErrorKind::kInvalidArgument, {"'format' is missing"},
              [] { std::ignore = TuningTable::FromJson("{}"); });
  ExpectError(ErrorKind::kInvalidArgument, {"an object is wanted"},
              [] { std::ignore = TuningTable::FromJson("[]"); });
  refused("hopyard tuning table", "something else", {"'format' is no 'hopyard tuning table'"});
  refused("\"version\": 2", "\"version\": 0", {"'version' is 0"});
  refused("\"version\": 2", "\"version\": \"1\"", {"'version' is \"1\" (string)"});
  refused("\"layers\": [", "\"layers\": {}, \"more\": [", {"'layers' is missing or no array"});
  refused("\"units\": 8", "\"units\": 8.5", {"'machine.units' is 8.5"});
  refused("\"hidden_size\": 65, ", "", {"'layers[0].key.hidden_size' is missing"});
  refused("\"hidden_size\": 65, ", "\"hidden_size\": 65, \"new\": 1, ", {"layers[0].key", "30"});
  refused("\"hidden_size\": 65", "\"hidden_size\": 66", {"layers[1].key", "another layer as well"});
  refused("\"top_k\": 0", "\"top_k\": 0, \"top_k\": 0", {"'top_k' twice"});
  refused("\"weights\": \"bf16\"", "\"weights\": \"bf17\"",
          {"layers[0].key.weights", "'bf17' is not known", "bf16, fp8_block128"});
  refused("2.6", "1e60", {"layers[0].key.routing.scaling_factor", "a finite number"});
  refused("\"path.ids\": false", "\"path.ids\": 0", {"path.ids", "true or false"});
  refused("\"last\": 300", "\"last\": 3", {"layers[0].", "last=3", "wanted more than 16"});
  refused("\"us\": 13.5", "\"us\": null", {"layers[0].ranges[0].us", "missing"});
  refused("\"us\": 13.5", "\"us\": \"13.5\"", {"layers[0].ranges[0].us", "a number is wanted"});
  refused("\"faults\": [", "\"faults\": [7, ", {"layers[0].faults[0]", "an object is wanted"});
}

}  // namespace
}  // namespace hopyard::tune::testing
