// SPDX-License-Identifier: Apache-2.0
// The safetensors reader and writer: round trips, and every way in which a header can lie.
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <sys/stat.h>

#include "checkpoint/safetensors.h"
#include "tests/checkpoint_support.h"

namespace hopyard::checkpoint_test {
namespace {

using checkpoint::ParseSafetensors;
using checkpoint::ViewOf;

Error ParseError(const std::string& bytes) {
  return Thrown([&] { (void)ParseSafetensors(bytes.data(), bytes.size(), "f.safetensors"); });
}

struct Corruption {
  std::string name;
  std::string header;
  size_t data_bytes;
  std::vector<std::string> message;
};

std::string Entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return '"' + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + '}';
}

std::string One(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return '{' + Entry("a.b", dtype, shape, offsets) + '}';
}

std::vector<Corruption> SizeCorruptions() {
  const std::string max = std::to_string(std::numeric_limits<uint64_t>::max());
  return {
      {"UnknownDtype", One("F7", "[4]", "[0,4]"), 4, {"'a.b'", "'F7'", "BF16"}},
      {"NegativeExtent", One("U8", "[-4]", "[0,4]"), 4, {"got -4", "shape of tensor 'a.b'"}},
      {"FractionalExtent", One("U8", "[4.5]", "[0,4]"), 4, {"got 4.5", "integers"}},
      {"TextExtent", One("U8", R"(["4"])", "[0,4]"), 4, {"got a string", "shape"}},
      {"NullExtent", One("U8", "[null]", "[0,4]"), 4, {"got null"}},
      {"BooleanExtent", One("U8", "[true]", "[0,4]"), 4, {"got true"}},
      {"ExtentOver63Bits", One("U8", "[" + max + "]", "[0,4]"), 4, {max, "2^63"}},
      {"ExtentOver64Bits",
       One("U8", "[99999999999999999999]", "[0,4]"),
       4,
       {"99999999999999999999"}},
      {"ProductOverflows",
       One("F32", "[4294967296,4294967296]", "[0,0]"),
       0,
       {"'a.b'", "[4294967296, 4294967296]", "no valid size"}},
      {"ProductOverflowsBesideZero",
       One("F32", "[4294967296,0,4294967296]", "[0,0]"),
       0,
       {"no valid size"}},
      {"HalfByte", One("F4", "[3]", "[0,1]"), 1, {"no valid size"}},
      {"TooManyDimensions",
       One("U8", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,1]"),
       1,
       {"more than 32 dimensions"}},
      {"BeginAfterEnd", One("U8", "[4]", "[4,0]"), 4, {"[4, 0]", "begin <= end"}},
      {"OutOfRange", One("U8", "[8]", "[0,8]"), 4, {"[0, 8]", "4 bytes of data"}},
      {"HugeOffsets",
       One("U8", "[1]", "[18446744073709551614,18446744073709551615]"),
       4,
       {"18446744073709551614", "4 bytes of data"}},
      {"NegativeOffset", One("U8", "[4]", "[-4,0]"), 4, {"got -4", "data_offsets"}},
      {"OneOffset", One("U8", "[4]", "[0]"), 4, {"has 1 numbers"}},
      {"ThreeOffsets", One("U8", "[4]", "[0,4,8]"), 4, {"more than two"}},
      {"OffsetsNoArray", One("U8", "[4]", "4"), 4, {"got 4", "an array is wanted"}},
      {"SizeMismatch", One("F32", "[2]", "[0,4]"), 4, {"4 bytes", "[2] of F32", "wants 8"}},
      {"ScalarSizeMismatch", One("F32", "[]", "[0,8]"), 8, {"[] of F32", "wants 4"}},
      {"Overlap",
       '{' + Entry("a", "U8", "[4]", "[0,4]") + ',' + Entry("b", "U8", "[4]", "[2,6]") + '}',
       6,
       {"'b' at [2, 6] overlaps tensor 'a' at [0, 4]"}},
      {"SameBytesTwice",
       '{' + Entry("a", "U8", "[4]", "[0,4]") + ',' + Entry("b", "U8", "[4]", "[0,4]") + '}',
       4,
       {"overlaps"}},
      {"Hole",
       '{' + Entry("a", "U8", "[2]", "[0,2]") + ',' + Entry("b", "U8", "[2]", "[4,6]") + '}',
       6,
       {"bytes [2, 4)", "next is 'b'"}},
      {"LeadingHole", One("U8", "[2]", "[2,4]"), 4, {"bytes [0, 2)"}},
      {"TrailingBytes", One("U8", "[2]", "[0,2]"), 4, {"bytes [2, 4)"}},
      {"NoTensorsButData", "{}", 4, {"bytes [0, 4)"}},
  };
}

std::vector<Corruption> StructureCorruptions() {
  const std::string deep(100'000, '[');
  return {
      {"DuplicateName",
       '{' + Entry("a", "U8", "[2]", "[0,2]") + ',' + Entry("a", "U8", "[2]", "[2,4]") + '}',
       4,
       {"'a' appears twice"}},
      {"DuplicateField",
       R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
       1,
       {"'a'", "dtype twice"}},
      {"DuplicateShape",
       R"({"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})",
       1,
       {"shape twice"}},
      {"DuplicateMetadata",
       R"({"__metadata__":{},"__metadata__":{}})",
       0,
       {"__metadata__", "twice"}},
      {"UnknownField",
       R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})",
       1,
       {"'a' has a field 'x'"}},
      {"NoDtype", R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1, {"'a' lacks dtype"}},
      {"NoShape", R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1, {"'a' lacks shape"}},
      {"NoOffsets", R"({"a":{"dtype":"U8","shape":[1]}})", 1, {"'a' lacks data_offsets"}},
      {"DtypeNumber",
       R"({"a":{"dtype":8,"shape":[1],"data_offsets":[0,1]}})",
       1,
       {"got 8 as dtype"}},
      {"EntryNumber", R"({"a":1})", 1, {"got 1 as 'a'", "an object is wanted"}},
      {"EntryArray", R"({"a":[]})", 1, {"got an array"}},
      {"MetadataNumber", R"({"__metadata__":{"x":1}})", 0, {"got 1", "an object of strings"}},
      {"MetadataNested", R"({"__metadata__":{"x":{}}})", 0, {"got an object"}},
      {"MetadataText", R"({"__metadata__":"x"})", 0, {"got a string as '__metadata__'"}},
      {"NestedShape", One("U8", "[[4]]", "[0,4]"), 4, {"got an array"}},
      {"DeepNesting", "{\"a\":" + deep, 4, {"got an array"}},
      {"ObjectInTensor", R"({"a":{"dtype":{"x":1}}})", 4, {"got an object"}},
      {"Truncated", R"({"a":{"dtype":"U8")", 4, {"not JSON"}},
      {"TwoDocuments", "{}{}", 0, {"not JSON"}},
      {"NotUtf8", "{\"\xff\":1}", 0, {"not JSON"}},
      {"NotAnObject", "[]", 0, {"does not begin with '{'"}},
      {"LeadingSpace", " {}", 0, {"does not begin with '{'"}},
      {"EmptyHeader", "", 0, {"does not begin with '{'"}},
  };
}

class CorruptHeader : public ::testing::TestWithParam<Corruption> {};

TEST_P(CorruptHeader, IsRefusedByName) {
  const Corruption& c = GetParam();
  const Error error = ParseError(RawFile(c.header, std::string(c.data_bytes, 'x')));
  EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
  EXPECT_THAT(error.message(), ::testing::StartsWith("f.safetensors: "));
  for (const std::string& part : c.message) {
    EXPECT_THAT(error.message(), ::testing::HasSubstr(part));
  }
  EXPECT_LT(error.message().size(), 1000U);
}

std::string CaseName(const ::testing::TestParamInfo<Corruption>& param) {
  return param.param.name;
}
INSTANTIATE_TEST_SUITE_P(Sizes, CorruptHeader, ::testing::ValuesIn(SizeCorruptions()), CaseName);
INSTANTIATE_TEST_SUITE_P(Structure, CorruptHeader, ::testing::ValuesIn(StructureCorruptions()),
                         CaseName);

TEST(SafetensorsLength, IsCheckedAgainstTheFileAndTheCap) {
  for (size_t size = 0; size < 8; ++size) {
    const Error error = ParseError(std::string(size, '\0'));
    EXPECT_THAT(error.message(), ::testing::HasSubstr("has " + std::to_string(size) + " bytes"));
  }
  std::string file = RawFile("{}", "");
  file[0] = 3;
  EXPECT_THAT(ParseError(file).message(),
              ::testing::HasSubstr("header length is 3 bytes; the file has 2 after"));
  for (const uint64_t length :
       {uint64_t{100'000'001}, uint64_t{1} << 63, std::numeric_limits<uint64_t>::max()}) {
    std::memcpy(file.data(), &length, sizeof(length));
    EXPECT_THAT(ParseError(file).message(),
                ::testing::HasSubstr("header length is " + std::to_string(length) +
                                     " bytes; at most 100000000"));
  }
}

TEST(SafetensorsLength, EveryTruncationOfAFileIsRefused) {
  const std::string file = RawFile(One("F32", "[2,2]", "[0,16]"), std::string(16, 'x'));
  EXPECT_NO_THROW((void)ParseSafetensors(file.data(), file.size(), "f"));
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_EQ(ParseError(file.substr(0, size)).kind(), ErrorKind::kInvalidArgument) << size;
  }
}

TEST(SafetensorsNames, AreShownWithoutControlCharactersAndCut) {
  const std::string name = R"(\u001b[31m)" + std::string(5000, 'n');
  const Error error = ParseError(RawFile('{' + Entry(name, "F7", "[1]", "[0,1]") + '}', "x"));
  EXPECT_EQ(error.message().find('\x1b'), std::string::npos);
  EXPECT_THAT(error.message(), ::testing::HasSubstr("\\x1b[31mnnn"));
  EXPECT_THAT(error.message(), ::testing::HasSubstr("(5005 bytes)"));
  EXPECT_LT(error.message().size(), 1000U);
}

TEST(SafetensorsView, MisalignedTensorsAreRefusedAndAlignedNeighboursAreNot) {
  std::string header =
      '{' + Entry("byte", "U8", "[1]", "[0,1]") + ',' + Entry("word", "F32", "[1]", "[1,5]") + '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string text = RawFile(header, "abcde");
  const std::vector<char> file(text.begin(), text.end());
  const auto parsed = ParseSafetensors(file.data(), file.size(), "f.safetensors");
  EXPECT_EQ(At(ViewOf(parsed.tensors[0], parsed, file.data(), "f.safetensors"), {0}), 'a');
  ExpectError([&] { (void)ViewOf(parsed.tensors[1], parsed, file.data(), "f.safetensors"); },
              ErrorKind::kUnsupported,
              {"f.safetensors", "'word'", "byte " + std::to_string(8 + header.size() + 1),
               "not a multiple of 4", "WriteSafetensors"});
}

TEST(SafetensorsView, DtypesAndRanksWithoutAViewAreRefusedByName) {
  const std::string file = RawFile('{' + Entry("flags", "BOOL", "[2]", "[0,2]") + ',' +
                                       Entry("five", "U8", "[1,1,1,1,2]", "[2,4]") + '}',
                                   "abcd");
  const auto parsed = ParseSafetensors(file.data(), file.size(), "f");
  ASSERT_EQ(parsed.tensors.size(), 2U);
  ExpectError([&] { (void)ViewOf(parsed.tensors[1], parsed, file.data(), "f"); },
              ErrorKind::kUnsupported, {"'flags'", "BOOL"});
  ExpectError([&] { (void)ViewOf(parsed.tensors[0], parsed, file.data(), "f"); },
              ErrorKind::kUnsupported, {"'five'", "[1, 1, 1, 1, 2]", "at most 4"});
}

TEST(SafetensorsFile, WhatIsWrittenIsReadBack) {
  const TemporaryDirectory directory;
  const std::vector<uint8_t> bytes = {1, 2, 3};
  const std::vector<float> floats = {1.5F, -2.0F, 3.0F, 4.0F, 5.0F, 6.0F};
  const std::vector<int64_t> ids = {-7, int64_t{1} << 40};
  const float scalar = 42.0F;
  const std::string path = directory / "t.safetensors";
  WriteSafetensors(path, {{"bytes", "U8", {3}, bytes.data()},
                          {"\u00fcml\"aut\\", "F32", {2, 3}, floats.data()},
                          {"ids", "I64", {2}, ids.data()},
                          {"empty", "BF16", {0, 4096}, nullptr},
                          {"scalar", "F32", {}, &scalar}});
  std::optional<SafetensorsFile> file = SafetensorsFile::Open(path);
  EXPECT_THAT(file->names(),
              ::testing::ElementsAre("bytes", "empty", "ids", "scalar", "\u00fcml\"aut\\"));
  const TensorView view = file->Tensor("\u00fcml\"aut\\");
  EXPECT_THAT(Shape(view), ::testing::ElementsAre(2, 3));
  EXPECT_TRUE(view.is_contiguous());
  EXPECT_EQ(At(view, {1, 0}), 4.0F);
  EXPECT_EQ(At(file->Tensor("scalar"), {}), 42.0F);
  EXPECT_EQ(file->Tensor("ids").dtype, DType::kInt64);
  EXPECT_EQ(file->Tensor("ids").as<const int64_t>()[1], int64_t{1} << 40);
  EXPECT_EQ(At(file->Tensor("bytes"), {2}), 3.0F);
  const TensorView empty = file->Tensor("empty");
  EXPECT_TRUE(empty.defined());
  EXPECT_THAT(Shape(empty), ::testing::ElementsAre(0, 4096));
  EXPECT_EQ(empty.numel(), 0);
  for (const std::string& name : file->names()) {
    const TensorView each = file->Tensor(name);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(each.data) % static_cast<uintptr_t>(SizeOf(each.dtype)),
              0U);
  }
  ExpectError([&] { (void)file->Tensor("nope"); }, ErrorKind::kInvalidArgument,
              {"t.safetensors", "no tensor 'nope' among its 5"});
  // The owner alone keeps the map alive.
  const std::shared_ptr<const void> owner = file->owner();
  file.reset();
  EXPECT_EQ(At(view, {1, 2}), 6.0F);
}

TEST(SafetensorsFile, DataBeginsAtAMultipleOfEightWhateverTheHeader) {
  const TemporaryDirectory directory;
  const double value = 1.0;
  for (size_t length = 0; length < 9; ++length) {
    const std::string path = directory / "t.safetensors";
    WriteSafetensors(path, {{std::string(length, 'n'), "F64", {1}, &value}});
    const SafetensorsFile file = SafetensorsFile::Open(path);
    EXPECT_EQ(*file.Tensor(std::string(length, 'n')).as<const double>(), 1.0);
  }
}

TEST(SafetensorsFile, AnEmptyListIsAFile) {
  const TemporaryDirectory directory;
  WriteSafetensors(directory / "t.safetensors", {});
  EXPECT_TRUE(SafetensorsFile::Open(directory / "t.safetensors").names().empty());
}

TEST(SafetensorsFile, OnlyRegularFilesAreOpened) {
  const TemporaryDirectory directory;
  ExpectError([&] { (void)SafetensorsFile::Open(directory / "no"); }, ErrorKind::kInvalidArgument,
              {"/no: cannot be opened", "No such file"});
  ExpectError([&] { (void)SafetensorsFile::Open(directory.path()); }, ErrorKind::kInvalidArgument,
              {"not a regular file"});
  ASSERT_EQ(::mkfifo((directory / "fifo").c_str(), 0600), 0);
  ExpectError([&] { (void)SafetensorsFile::Open(directory / "fifo"); }, ErrorKind::kInvalidArgument,
              {"not a regular file"});
  directory.Write("empty", "");
  ExpectError([&] { (void)SafetensorsFile::Open(directory / "empty"); },
              ErrorKind::kInvalidArgument, {"has 0 bytes"});
}

TEST(WriteSafetensors, RefusesWhatItCouldNotReadBackAndLeavesNothing) {
  const TemporaryDirectory directory;
  const float value = 1.0F;
  const auto write = [&](const std::vector<NamedTensor>& tensors) {
    return [&directory, tensors] { WriteSafetensors(directory / "t.safetensors", tensors); };
  };
  const ErrorKind kind = ErrorKind::kInvalidArgument;
  ExpectError(write({{"a", "F31", {1}, &value}}), kind, {"'a'", "'F31'"});
  ExpectError(write({{"a", "F32", {-1}, &value}}), kind, {"'a'", "[-1]"});
  ExpectError(write({{"a", "F32", {1}, nullptr}}), kind, {"'a' has 4 bytes but no data"});
  ExpectError(write({{"a", "F32", {1}, &value}, {"a", "F32", {1}, &value}}), kind,
              {"'a' is given twice"});
  ExpectError(write({{"__metadata__", "F32", {1}, &value}}), kind, {"reserves"});
  ExpectError(write({{"a\xff", "F32", {1}, &value}}), kind, {"'a\\xff'", "UTF-8"});
  ExpectError(write({{"a", "F32", {int64_t{1} << 62, 16}, &value}}), kind, {"no valid size"});
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
  ExpectError([&] { WriteSafetensors(directory / "no/t", {}); }, kind,
              {"cannot be created", "No such file"});
}

TEST(WriteSafetensors, ReplacesTheFileAtOnceAndKeepsOldMapsReadable) {
  const TemporaryDirectory directory;
  const std::string path = directory / "t.safetensors";
  const float before = 1.0F;
  const float after = 2.0F;
  WriteSafetensors(path, {{"a", "F32", {1}, &before}});
  const SafetensorsFile old = SafetensorsFile::Open(path);
  WriteSafetensors(path, {{"a", "F32", {1}, &after}});
  EXPECT_EQ(At(old.Tensor("a"), {0}), 1.0F);
  EXPECT_EQ(At(SafetensorsFile::Open(path).Tensor("a"), {0}), 2.0F);
  // A failing write leaves the old file and no temporary one.
  std::filesystem::create_directory(directory / "d");
  directory.Write("d/x", "");
  EXPECT_EQ(Thrown([&] { WriteSafetensors(directory / "d", {}); }).kind(),
            ErrorKind::kInvalidArgument);
  size_t entries = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory.path())) {
    ++entries;
  }
  EXPECT_EQ(entries, 2U);
}

}  // namespace
}  // namespace hopyard::checkpoint_test
