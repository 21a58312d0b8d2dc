PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Models this small run fastest on one thread, many times so when the other core is busy.
export OMP_NUM_THREADS ?= 1

.PHONY: setup extension demo test static lint readme gpu gpu-dry docs tables clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py
	@echo "== creating $(VENV) and installing released packages (several minutes, about 6 GB) =="
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --upgrade pip
	$(BIN)/python -m pip install --progress-bar on --editable ".[test]"
	$(MAKE) extension
	touch $@

# Without a compiler there is no extension, which nothing needs. That of CUDA takes a minute and only GPUs run it.
extension:  ## the C++ kernels, where there is a compiler; SRPO_BUILD_CUDA=1 for those of CUDA
	SRPO_BUILD_CUDA=$${SRPO_BUILD_CUDA:-0} $(BIN)/python setup.py build_ext --inplace

demo: setup  ## SRPO on the tiny model, pictures and report under runs/
	$(BIN)/srpo demo

test: setup lint  ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # long files are not the largest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/ops  # the same tests on the kernels themselves

# The extension is built first where there is an nvcc: the profile itself writes only its results.
gpu:  ## test and time everything on this machine's GPU in under ten minutes, with the active Python; PARTS=ops,vae
	-$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m benchmarks gpu $(if $(PARTS),--parts $(PARTS))

gpu-dry: setup  ## every line of it, on tiny shapes and no GPU
	$(BIN)/python -m benchmarks gpu --dry --out runs/gpu-dry $(if $(PARTS),--parts $(PARTS))

static: setup  ## kernels and models without a GPU, held against benchmarks/pins
	$(BIN)/python -m benchmarks static

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup tables  ## write docs/ops.md from the registry, and all tables
	$(BIN)/python docs/ops.py

tables: setup  ## write the tables of README and docs from benchmarks/results
	$(BIN)/python -m docs.tables

readme: setup  ## measure the demo again and put its table and picture into the README
	rm -rf runs/readme
	$(BIN)/srpo demo --out runs/readme
	$(BIN)/python docs/update.py runs/readme

clean:
	rm -rf $(VENV) runs build *.egg-info srpo_kernels/*.so
