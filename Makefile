# make train   trains configs/tiny.py from a fresh clone: .venv, install, train, evaluate, picture, sample
# make test    lint, then the test suite (the slow ones too: make test-all)
# make test-oracles   compares layers with those of torch (transformers, fla-core, rwkv, timm, entmax, ott-jax, performer-pytorch, peft), and with lm-eval's hf backend
# make test-cuda-aot   compiles every op for GPUs that are not here;  make test-cuda-spills  its checks that nothing spills, the usual sizes (CI)
# make test-buckets   runs and data in buckets, on servers of this machine (a part of test-all)
# make test-gpu   the kernels on this machine's NVIDIA GPU: values and gradients
# make test-types   a part of the suite with every annotation, shapes too, checked at every call
# make wheel   dist/: the source distribution and the wheel;  make smoke  installs the wheel elsewhere, trains, evaluates, generates
# make docs    the site of docs/, in build/site
# make lint    ruff, its format, types (pyrefly);  make goldens  rewrites the goldens of the tests;  make bench  benchmarks on this machine
# make bench-model   model times of TPUs made anew; fails where one grew by more than 3 %

# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv/bin
export PYTHONUNBUFFERED := 1
# A process a core: tests compile more than they compute, and a compilation has one thread. A file stays in one process.
PARALLEL := -n auto --maxprocesses=4 --dist=loadfile

.PHONY: train test test-types test-all test-buckets test-oracles test-cuda-aot test-cuda-spills test-gpu wheel smoke docs lint goldens bench bench-model clean

train: .venv/installed
	$(VENV)/python train.py --config=configs/tiny.py

test: .venv/installed lint
	$(TYPECHECK) $(TYPED)
	$(VENV)/python -m pytest $(PARALLEL) -m "not slow"

test-all: .venv/installed lint
	$(VENV)/python -m pytest $(PARALLEL)
	$(MAKE) test-buckets

# The servers in an environment of their own, inside the other: moto and s3fs want different versions of botocore.
test-buckets: .venv-buckets/installed
	.venv-buckets/bin/python -m pytest tests/buckets

# What the annotations say of shapes and dtypes holds in these tests: ops, layers, the model and the training step;
# `make test` takes the first line. Tests of bad input pass wrong types on purpose, and have it in their names.
TYPED := tests/gatedjax/layers/test_face.py tests/gatedjax/test_model.py tests/gatedjax/training/test_train_step.py
TYPED_ALL := $(TYPED) tests/gatedjax/layers tests/kernels_pallas/attention/test_attention.py \
  tests/kernels_pallas/linear_scan/test_linear_scan.py tests/kernels_pallas/grouped_matmul/test_grouped_matmul.py \
  tests/kernels_pallas/rotary/test_rotary.py tests/kernels_pallas/causal_conv/test_causal_conv.py
# These of the layers' tests hand over numpy arrays, which the annotations of the layers do not allow.
UNTYPED := $(addprefix --ignore=tests/gatedjax/layers/,moe/test_exchange.py moe/test_padding.py moe/test_selection.py \
  moe/test_shared_router.py moe/test_skipping.py test_attention_layer.py test_bidirectional.py test_bidirectional_layer.py \
  test_cache_fuser.py test_converted.py test_customized.py test_feature_gate.py test_low_rank.py test_mixing.py \
  test_normalizer_options.py test_on_demand.py test_rwkv6.py test_sambay.py)
TYPECHECK = GATEDJAX_TYPECHECK=1 $(VENV)/python -m pytest $(PARALLEL) -m "not slow" -k "not (bad or wrong or refus or named)"

test-types: .venv/installed
	$(TYPECHECK) $(TYPED_ALL) $(UNTYPED)

# In an environment of its own: torch takes gigabytes.
test-oracles: .venv-oracles/installed
	.venv-oracles/bin/python -m pytest tests/kernels_pallas/attention/test_attention_normalizers.py tests/kernels_pallas/attention/test_doubly_stochastic.py tests/gatedjax/layers/test_attention_options.py tests/gatedjax/layers/moe/test_moe_peers.py tests/gatedjax/layers/test_recurrent_peers.py tests/gatedjax/layers/test_attention_peers.py tests/gatedjax/layers/test_mixing_peers.py tests/gatedjax/layers/test_performer_peer.py tests/gatedjax/interop/test_interop_peers.py tests/gatedjax/interop/test_xlora_peers.py tests/gatedjax/training/test_fine_tuning_peers.py tests/gatedjax/test_encoder_peers.py -k equals
	.venv-oracles/bin/python -m pytest tests/gatedjax/evaluation/test_lm_eval.py

# In an environment of its own: the CUDA plugin and NVIDIA's assembler take 1.5 GB, and the plugin looks for a driver
# whenever jax starts. A test is a compilation or two: they are dealt out one by one.
test-cuda-aot: .venv-cuda/installed
	XLA_FLAGS=--xla_backend_optimization_level=3 .venv-cuda/bin/python -m pytest -n auto --maxprocesses=4 --dist=worksteal tests/gatedjax/aot/test_aot_cuda.py tests/kernels_pallas/*/test_*_cuda.py tests/kernels_pallas/*_scan/test_*_step_gpu.py

test-cuda-spills: .venv-cuda/installed
	XLA_FLAGS=--xla_backend_optimization_level=3 .venv-cuda/bin/python -m pytest -n auto --maxprocesses=4 --dist=worksteal tests/kernels_pallas/*/test_*_cuda.py -k "(claimed_spills and 128 or grouped and spills) and not float32 and not -float16"

# On a machine with an NVIDIA GPU: the kernels there, values and gradients.
test-gpu: .venv/installed
	$(VENV)/pip install --quiet -e '.[cuda13,gpu-kernels]'
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_backend_optimization_level=3 $(VENV)/python -m pytest tests/kernels_pallas/*/test_*_device.py

wheel: .venv/installed
	rm -rf build/lib build/bdist.*
	$(VENV)/python -m build

smoke: .venv/installed
	$(VENV)/python -m pytest tests/test_install.py

docs: .venv/installed
	$(VENV)/pip install --quiet -e '.[docs]'
	$(VENV)/python docs/config_reference.py
	$(VENV)/zensical build --strict

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/pyrefly check --output-format=min-text

goldens: .venv/installed
	$(VENV)/python -m pytest tests/gatedjax/config/test_config.py tests/gatedjax/training/test_train_step.py -k golden --refresh-goldens

bench: .venv/installed
	$(VENV)/python benchmarks/ops_cpu.py
	$(VENV)/python benchmarks/train_cpu.py
	$(VENV)/python benchmarks/train_cpu.py --model=gated_deltanet
	$(VENV)/python benchmarks/tpu_model.py

# Hours: every stored model time of a TPU is made anew. BENCH_MODEL=step: of whole steps only.
BENCH_MODEL ?= step,attention,causal_conv,delta_scan,linear_scan,moe,rotary
bench-model: .venv/installed
	$(VENV)/python benchmarks/model_check.py --of=$(BENCH_MODEL)

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.12 or newer was found. Install one (python.org, apt, pyenv, uv) and run: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet -e '.[test]'
	@touch $@

.venv-oracles/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/pip install --quiet -e '.[test,oracles,lm-eval]'
	@touch $@

.venv-buckets/installed: pyproject.toml
	$(PYTHON) -m venv .venv-buckets
	.venv-buckets/bin/pip install --quiet -e '.[buckets]' pytest pytest-xdist
	$(PYTHON) -m venv .venv-buckets/servers
	.venv-buckets/servers/bin/pip install --quiet 'moto[server]>=5' gcp-storage-emulator
	@touch $@

.venv-cuda/installed: pyproject.toml
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet -e '.[cuda-aot]' pytest pytest-xdist hypothesis
	@touch $@

clean:
	rm -rf .venv .venv-buckets .venv-cuda .venv-oracles .cache build dist *.egg-info
