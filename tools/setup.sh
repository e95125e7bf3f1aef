#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing and builds. Every step may be repeated and does nothing when there is
# nothing to do.
#
#   tools/setup.sh [system] [venv] [build] [package] [test-packages]     default: the first four
#
#   system         Debian packages: with apt-get when root, else names what is missing
#   venv           .venv with tools/requirements-dev.txt
#   build          configures the preset `release` and builds it with all cores
#   package        installs the Python package into .venv from the same build folder
#   test-packages  tools/requirements-test.txt (torch, transformers) into .venv
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "hopyard: $*"; }
fail() {
  echo "hopyard: $*" >&2
  exit 1
}

has_header() {
  [ -e "/usr/include/$1" ] || [ -e "/usr/local/include/$1" ]
}

# True where what a Debian package brings is there, wherever it came from.
has_package() {
  case "$1" in
    g++) command -v g++ ;;
    cmake) command -v cmake ;;
    ninja-build) command -v ninja ;;
    git) command -v git ;;
    libfmt-dev) has_header fmt/core.h ;;
    nlohmann-json3-dev) has_header nlohmann/json.hpp ;;
    libcli11-dev) has_header CLI/CLI.hpp ;;
    libgtest-dev) has_header gtest/gtest.h ;;
    libgmock-dev) has_header gmock/gmock.h ;;
    libbenchmark-dev) has_header benchmark/benchmark.h ;;
    # pip comes with ensurepip; the extension needs no CPython headers.
    python3-venv) python3 -c 'import ensurepip, venv' ;;
    *) dpkg-query -W -f '${Status}' "$1" | grep -q 'ok installed' ;;
  esac >/dev/null 2>&1
}

# Installs the packages named that are not there yet.
install_packages() {
  local package missing=()
  for package in "$@"; do
    has_package "$package" || missing+=("$package")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    return
  fi
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    fail "missing: ${missing[*]}; as root: apt-get install ${missing[*]}"
  fi
  say "apt-get install ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

setup_system() {
  install_packages g++ cmake ninja-build git libfmt-dev nlohmann-json3-dev libcli11-dev \
    libgtest-dev libgmock-dev libbenchmark-dev python3-venv
}

# Installs a requirements file into .venv unless this very file has been installed.
install_requirements() {
  local file="tools/requirements-$1.txt" stamp=".venv/requirements-$1.txt"
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python3 -m venv --clear .venv
  fi
  if ! cmp -s "$file" "$stamp"; then
    say "pip install -r $file"
    .venv/bin/python -m pip install -q --disable-pip-version-check -r "$file"
    cp "$file" "$stamp"
  fi
}

setup_venv() {
  install_requirements dev
}

setup_build() {
  # CMake keeps the paths of the folder that it configured in.
  local cache=build/release/CMakeCache.txt
  if [ -e "$cache" ] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" "$cache"; then
    say "build/release was configured for another folder; starting it anew"
    rm -rf build/release
  fi
  local log
  log=$(cmake --preset release 2>&1) || {
    echo "$log" >&2
    fail "cmake --preset release failed"
  }
  cmake --build build/release --parallel "$(nproc)"
}

setup_package() {
  # The same options as the preset's, so that the configured folder stays valid as it is.
  HOPYARD_TESTS=ON HOPYARD_CLI=ON .venv/bin/python -m pip install -q --disable-pip-version-check \
    --no-build-isolation --no-deps --force-reinstall .
}

setup_test_packages() {
  install_requirements test
}

main() {
  local step
  if [ $# -eq 0 ]; then
    set -- system venv build package
  fi
  for step in "$@"; do
    case "$step" in
      system | venv | build | package) "setup_$step" ;;
      test-packages) setup_test_packages ;;
      packages)
        shift
        install_packages "$@"
        return
        ;;
      *) fail "unknown step '$step'; wanted system, venv, build, package, test-packages" ;;
    esac
    shift
  done
}

main "$@"
