# Compiler flags shared by every target of the project (not by its consumers).
add_library(hopyard_options INTERFACE)
target_compile_options(
  hopyard_options
  INTERFACE -Wall
            -Wextra
            -Wshadow
            -Wconversion
            -Wno-sign-conversion
            -Werror
            -ffile-prefix-map=${CMAKE_SOURCE_DIR}/=
            # A result is a fixed FP32 operation sequence: no contraction behind our back.
            -ffp-contract=off)
if(HOPYARD_SANITIZE)
  target_compile_options(hopyard_options INTERFACE -fsanitize=address,undefined
                                                   -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(hopyard_options INTERFACE -fsanitize=address,undefined)
endif()
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(fmt REQUIRED)
find_package(nlohmann_json REQUIRED)
