// SPDX-License-Identifier: Apache-2.0
#include "cli/device_option.h"

#include <charconv>

#include <CLI/CLI.hpp>

#include "core/error.h"

namespace hopyard::cli {

void AddDeviceOption(CLI::App& command, std::string* device) {
  command.add_option("--device", *device, "cpu, cuda or cuda:N")->capture_default_str();
}

Device ParseDevice(const std::string& text) {
  if (text == "cpu") {
    return {};
  }
  if (text == "cuda") {
    return {DeviceKind::kCuda, 0};
  }
  const std::string prefix = "cuda:";
  int index = -1;
  const char* const end = text.data() + text.size();
  const bool prefixed = text.compare(0, prefix.size(), prefix) == 0;
  const bool number = prefixed && text.size() > prefix.size() &&
                      std::from_chars(text.data() + prefix.size(), end, index).ptr == end &&
                      index >= 0;
  HOPYARD_CHECK(number, kInvalidArgument)
      << "--device is '" << text << "'; wanted cpu, cuda or cuda:N";
  return {DeviceKind::kCuda, index};
}

std::string ToString(const Device& device) {
  return device.kind == DeviceKind::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

}  // namespace hopyard::cli
