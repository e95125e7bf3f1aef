// SPDX-License-Identifier: Apache-2.0
#include "tune/shipped.h"

#include <string>

#include "tune/table_json.h"

namespace hopyard::tune {

const std::vector<std::shared_ptr<const TuningTable>>& ShippedTables() {
  static const auto tables = [] {
    std::vector<std::shared_ptr<const TuningTable>> parsed;
    for (const ShippedFile& file : ShippedFiles()) {
      parsed.push_back(
          std::make_shared<const TuningTable>(ParseTable(file.text, std::string(file.name))));
    }
    return parsed;
  }();
  return tables;
}

}  // namespace hopyard::tune
