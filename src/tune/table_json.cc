// SPDX-License-Identifier: Apache-2.0
#include "tune/table_json.h"

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/json_file.h"
#include "checkpoint/text.h"
#include "core/error.h"
#include "tune/field_text.h"
#include "tune/key_fields.h"

namespace hopyard {
namespace {

using checkpoint::FieldReader;
using nlohmann::json;

constexpr const char* kFormatName = "hopyard tuning table";

// Bytes that are no UTF-8 become U+FFFD.
std::string Quoted(std::string_view text) {
  return json(std::string(text)).dump(-1, ' ', false, json::error_handler_t::replace);
}

// {"name": value, ...} on one line.
class ObjectText {
 public:
  template <class Value>
  ObjectText& Add(const char* name, const Value& value) {
    text_ += fmt::format("{}\"{}\": ", text_.empty() ? "" : ", ", name);
    if constexpr (std::is_convertible_v<Value, std::string_view>) {
      text_ += Quoted(value);
    } else if constexpr (std::is_enum_v<Value>) {
      text_ += Quoted(tune::FieldText(value));
    } else {
      text_ += tune::FieldText(value);
    }
    return *this;
  }
  [[nodiscard]] std::string text() const { return fmt::format("{{{}}}", text_); }

 private:
  std::string text_;
};

std::string Text(const TuningMachine& machine) {
  return ObjectText()
      .Add("device", machine.device)
      .Add("units", machine.units)
      .Add("isa", machine.isa)
      .Add("library", machine.library)
      .text();
}

std::string Text(const TuningKey& key) {
  ObjectText object;
  tune::VisitFields(key, [&](const char* name, const auto& field) { object.Add(name, field); });
  return object.text();
}

std::string Text(const TunedRange& range) {
  return ObjectText()
      .Add("last", range.last)
      .Add("tokens", range.tokens)
      .Add("tactic", range.tactic)
      .Add("us", range.us)
      .Add("untuned", range.untuned)
      .Add("untuned_us", range.untuned_us)
      .Add("noise", range.noise)
      .text();
}

std::string Text(const TuningFault& fault) {
  return ObjectText()
      .Add("tactic", fault.tactic)
      .Add("tokens", fault.tokens)
      .Add("reason", fault.reason)
      .text();
}

// [...], an item a line.
template <class Item>
std::string Lines(const std::vector<Item>& items) {
  std::string text;
  for (const Item& item : items) {
    text += (text.empty() ? "\n        " : ",\n        ") + Text(item);
  }
  return fmt::format("[{}{}]", text, items.empty() ? "" : "\n      ");
}

std::string Text(const TunedLayer& layer) {
  constexpr const char* kText =
      "    {{\n      \"key\": {},\n      \"routing\": {},\n      \"ranges\": {},\n"
      "      \"faults\": {}\n    }}";
  return fmt::format(kText, Text(layer.key), Quoted(layer.routing), Lines(layer.ranges),
                     Lines(layer.faults));
}

constexpr checkpoint::IntRange kInt = {0, std::numeric_limits<int32_t>::max()};

// An object of the file with its reader.
struct Section {
  const json* object = nullptr;
  FieldReader fields;

  [[nodiscard]] int Int(const char* name) const { return static_cast<int>(fields.Int(name, kInt)); }
  [[nodiscard]] Section Object(const char* name) const {
    FieldReader reader = fields.Object(name);
    return {&object->at(name), std::move(reader)};
  }
};

// One reader for each element of an array of objects.
std::vector<Section> Objects(const Section& section, const std::string& file,
                             const std::string& prefix, const char* name) {
  const auto found = section.object->find(name);
  HOPYARD_CHECK(found != section.object->end() && found->is_array(), kInvalidArgument)
      << section.fields.Where(name) << " is missing or no array of objects";
  std::vector<Section> sections;
  for (const json& element : *found) {
    const std::string where = fmt::format("{}{}[{}]", prefix, name, sections.size());
    HOPYARD_CHECK(element.is_object(), kInvalidArgument)
        << file << ": field '" << where << "' is " << element.type_name()
        << "; an object is wanted";
    sections.push_back({&element, FieldReader(element, file, where + '.')});
  }
  return sections;
}

TuningMachine ReadMachine(const Section& section) {
  TuningMachine machine;
  machine.device = section.fields.String("device");
  machine.units = section.Int("units");
  machine.isa = section.fields.String("isa");
  machine.library = section.fields.String("library");
  return machine;
}

template <class Field>
void ReadField(const FieldReader& fields, const char* name, Field* field) {
  if constexpr (std::is_same_v<Field, bool>) {
    *field = fields.Bool(name);
  } else if constexpr (std::is_same_v<Field, int>) {
    *field = static_cast<int>(fields.Int(name, kInt));
  } else if constexpr (std::is_same_v<Field, int64_t>) {
    *field = fields.Int(name, {});
  } else if constexpr (std::is_same_v<Field, float>) {
    *field = fields.Float(name);
  } else {
    try {
      *field = tune::EnumOf<Field>(fields.String(name));
    } catch (const Error& error) {
      throw Error(error.kind(), fields.Where(name) + ": " + error.message());
    }
  }
}

// Files of version 1 do not tell how weights lie in memory: their layers are K-major.
bool IsOfVersion1(std::string_view field) {
  return !field.starts_with("weight_orders.");
}

TuningKey ReadKey(const Section& section, int64_t version) {
  TuningKey key;
  size_t count = 0;
  tune::VisitFields(key, [&](const char* name, auto& field) {
    if (version > 1 || IsOfVersion1(name)) {
      ReadField(section.fields, name, &field);
      ++count;
    }
  });
  // A field that this library does not know may tell two layers apart.
  HOPYARD_CHECK(section.object->size() == count, kInvalidArgument)
      << section.fields.Where("") << " has " << section.object->size() << " fields; wanted the "
      << count << " of a layer and no other";
  return key;
}

TunedRange ReadRange(const FieldReader& fields) {
  TunedRange range;
  range.last = fields.Int("last", {});
  range.tokens = fields.Int("tokens", {});
  range.tactic = fields.String("tactic");
  range.us = fields.Number("us");
  range.untuned = fields.String("untuned");
  range.untuned_us = fields.Number("untuned_us");
  range.noise = fields.Number("noise");
  return range;
}

TuningFault ReadFault(const FieldReader& fields) {
  return {fields.String("tactic"), fields.Int("tokens", {}), fields.String("reason")};
}

TunedLayer ReadLayer(const Section& section, int64_t version, const std::string& file,
                     const std::string& where) {
  TunedLayer layer;
  layer.key = ReadKey(section.Object("key"), version);
  layer.routing = section.fields.String("routing");
  for (const Section& range : Objects(section, file, where, "ranges")) {
    layer.ranges.push_back(ReadRange(range.fields));
  }
  for (const Section& fault : Objects(section, file, where, "faults")) {
    layer.faults.push_back(ReadFault(fault.fields));
  }
  return layer;
}

// The file's version.
int64_t CheckFormat(const Section& root, const std::string& file) {
  HOPYARD_CHECK(root.fields.String("format") == kFormatName, kInvalidArgument)
      << root.fields.Where("format") << " is no '" << kFormatName
      << "': name a file that Hopyard's "
      << "tuner wrote";
  const int64_t version = root.fields.Int("version", {1});
  HOPYARD_CHECK(version <= tune::kTableVersion, kInvalidArgument)
      << file << ": is a tuning table of version " << version << "; this library knows "
      << tune::kTableVersion << ": use the newer library that wrote it, or tune into another file";
  return version;
}

}  // namespace

std::string TuningTable::ToJson() const {
  std::string text = fmt::format(
      "{{\n  \"format\": \"{}\",\n  \"version\": {},\n  \"machine\": {},\n  \"layers\": [",
      kFormatName, tune::kTableVersion, Text(machine_));
  for (const TunedLayer& layer : layers_) {
    text += (&layer == layers_.data() ? "\n" : ",\n") + Text(layer);
  }
  return text + (layers_.empty() ? "]\n}\n" : "\n  ]\n}\n");
}

TuningTable TuningTable::FromJson(std::string_view text) {
  return tune::ParseTable(text, "tuning table");
}

namespace tune {

TuningTable ParseTable(std::string_view text, const std::string& file) {
  HOPYARD_CHECK(text.size() <= kMaxTableBytes, kInvalidArgument)
      << checkpoint::Printable(file) << ": has " << text.size() << " bytes; at most "
      << kMaxTableBytes << " are allowed";
  const json document = checkpoint::ParseJsonObject(text.data(), text.size(), file);
  const std::string name = checkpoint::Printable(file);
  const Section root = {&document, FieldReader(document, file)};
  const int64_t version = CheckFormat(root, name);
  TuningTable table(ReadMachine(root.Object("machine")));
  size_t count = 0;
  for (const Section& section : Objects(root, name, "", "layers")) {
    const std::string where = fmt::format("layers[{}].", count++);
    TunedLayer layer = ReadLayer(section, version, name, where);
    HOPYARD_CHECK(table.Find(layer.key) == nullptr, kInvalidArgument)
        << name << ": field '" << where << "key' is that of another layer as well";
    try {
      table.Put(std::move(layer));
    } catch (const Error& error) {
      throw Error(error.kind(), fmt::format("{}: {}{}", name, where, error.message()));
    }
  }
  return table;
}

}  // namespace tune
}  // namespace hopyard
