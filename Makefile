# Entry points. `make run` and `make test` work on a fresh Debian 12: tools/setup.sh installs what is
# missing. They leave the command at build/release/bin/hopyard and the Python package in .venv.
.DEFAULT_GOAL := build
.PHONY: build run test lint format clean

HOPYARD := build/release/bin/hopyard
PYTHON := .venv/bin/python
PRESET_MODEL := qwen3-30b-a3b

build:
	@tools/setup.sh system venv build package

# One full-size layer in two weight formats, verified against the oracle.
run: build
	$(HOPYARD) run $(PRESET_MODEL) --weights mxfp4
	$(HOPYARD) run $(PRESET_MODEL) --weights bf16

# Tests run side by side, and torch has OpenMP threads of its own: idle ones must not spin.
test: build
	@tools/setup.sh test-packages
	OMP_WAIT_POLICY=passive ctest --preset release --parallel $$(nproc)
	OMP_WAIT_POLICY=passive HOPYARD_REQUIRE_TRANSFORMERS=1 $(PYTHON) -m pytest -q

lint:
	@.ci/run format ruff checks

format:
	git ls-files -z --cached --others --exclude-standard '*.h' '*.cc' | xargs -0 clang-format -i
	.venv/bin/ruff check -q --fix .
	.venv/bin/ruff format -q .

clean:
	rm -rf build
