# `make demo` and `make test` need CPython 3.11 or newer and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# The root holds a folder `kernels`, which must not stand in front of the package of that name.
export PYTHONSAFEPATH := 1

DEMO_BUNDLE := bundles/shapes-64x64-fp32
PICTURES := --prompt "a large red circle at the top right on a white background" \
  --prompt "a large yellow square at the top left on a green background" \
  --prompt "a large blue triangle at the center on a black background" \
  --prompt "a small purple cross at the top left on a black background"

.PHONY: help setup demo test check load bench bench-demo bench-rows bench-sd15 bench-models bench-gpu clean

help:
	@echo "make demo    build the bundled demo model, draw pictures vanilla and gated, say where they are"
	@echo "make test    run the whole suite, in an order of its own each time"
	@echo "make check   ruff and mypy --strict"
	@echo "make load    measure a server of the demo model under load, into docs/results/"
	@echo "make bench   measure on this machine, into docs/results/ (two or three hours on two cores)"
	@echo "make bench-gpu   the same on a machine with an NVIDIA GPU, its tests first; make bench-gpu-PART runs one part:"
	@echo "                 $(GPU_PARTS)"
	@echo "make clean   remove what the others made"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tgate-trt needs CPython 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/tgate-build --model shapes --output $(DEMO_BUNDLE) --backend onnxruntime --backend tensorrt-rtx \
	  --compute-capability SM86 --compute-capability SM89 --compute-capability SM120
	$(BIN)/tgate-generate $(DEMO_BUNDLE) $(PICTURES) --gate-step none --gate-step 10 --gate-step 5 --output pictures/demo.png

# With TensorRT's stubs, against which the stand-in for its module is compared.
test: $(READY) .typing/full
	$(BIN)/pytest -n auto --dist loadfile

# The engines are checked twice: against TensorRT's API and against TensorRT-RTX's, each in the place of the module `tensorrt`.
check: $(READY) .typing/tgate_trt .typing/full .typing/rtx
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing:.typing/full $(BIN)/mypy --strict -p tgate_trt
	MYPYPATH=.typing:.typing/rtx $(BIN)/mypy --strict -p tgate_trt.engines --cache-dir .mypy_cache/rtx

# mypy does not read setuptools' package-dir: it sees the four folders as one package through links.
.typing/tgate_trt: Makefile
	rm -rf $@ && mkdir -p $@
	for path in tgate_trt/*; do ln -s "../../$$path" $@/; done
	for room in export engines kernels; do ln -s "../../$$room" $@/$$room; done

# A keyword as a name, and a parameter without a default after one with.
MEND_STUBS := 's/\bin: /in_: /; s/(channel_axis: [a-zA-Z_.]+)(\) -> IScaleLayer)/\1 = ...\2/'

# Without its dependencies, for TensorRT itself is not on PyPI.
.typing/full: Makefile $(READY)
	rm -rf $@ && $(BIN)/python -m pip install --quiet --no-deps --target $@ tensorrt-stubs==10.13.0.35.1
	sed -i -E $(MEND_STUBS) $@/tensorrt_bindings/tensorrt.pyi

# TensorRT-RTX comes without stubs: they are read from its module.
.typing/rtx: Makefile $(READY)
	rm -rf $@ && mkdir -p $@/tensorrt
	$(BIN)/stubgen --quiet --inspect-mode -p tensorrt_rtx_bindings -o $@
	sed -i -E $(MEND_STUBS) $@/tensorrt_rtx_bindings/tensorrt_rtx.pyi
	printf 'from tensorrt_rtx_bindings.tensorrt_rtx import *\n__version__: str\n' > $@/tensorrt/__init__.pyi

# Each file of results names the command that made it. Each of the three takes the better part of an hour, or more than one.
bench: bench-demo bench-rows bench-models bench-sd15

RESULTS := docs/results
results = --json $(RESULTS)/$(1).json --markdown $(RESULTS)/$(1).md
EVERY_GRAPH := --graphs vanilla,planning,fidelity --backend onnxruntime --backend pytorch
EVERY_GATE := --gate-step 3,5,7,10,15 --after-gate negative,positive,fading --quality --samples 102

bench-demo: $(READY)
	$(BIN)/tgate-build --model shapes --output bundles/bench-shapes $(EVERY_GRAPH)
	$(BIN)/tgate-bench run bundles/bench-shapes --gate-step 10 --backend onnxruntime,pytorch --beside eager,compile,official --rounds 15 \
	  $(call results,bench-shapes) --plot $(RESULTS)/bench-shapes.png
	$(BIN)/tgate-bench run bundles/bench-shapes --backend onnxruntime $(EVERY_GATE) --rounds 5 \
	  $(call results,after-gate-shapes) --plot $(RESULTS)/after-gate-shapes.png
	$(BIN)/tgate-bench run bundles/bench-shapes --backend onnxruntime $(EVERY_GATE) --guidance-scale 5 --rounds 1 --no-memory \
	  $(call results,after-gate-shapes-guidance-5)
	$(BIN)/tgate-generate bundles/bench-shapes --backend onnxruntime $(PICTURES) --gate-step none --gate-step 5 \
	  --after-gate negative --after-gate positive --after-gate fading --output $(RESULTS)/after-gate-pictures.png
	$(BIN)/tgate-bench spacings bundles/bench-shapes --backend onnxruntime $(call results,spacings)
	$(BIN)/tgate-analyze bundles/bench-shapes --backend onnxruntime --json $(RESULTS)/analysis-shapes.json --plot $(RESULTS)/analysis-shapes.png
	$(BIN)/tgate-bench steps bundles/bench-shapes --backend onnxruntime,pytorch $(call results,steps)
	$(BIN)/tgate-bench kernels bundles/bench-shapes $(call results,kernels)
	$(BIN)/tgate-bench probe $(call results,probe)

# Every method, their combinations, and vanilla in fewer steps.
ROW_GATES := 10 5 10,after=positive 10,sp=5,warm=2 none,deep=2 none,deep=3 10,deep=3 drop=10 10,unguided=2 \
  none,forecast=2 none,forecast=3,rule=chebyshev 10,after=positive,forecast=2 7,after=positive,forecast=2 5,after=positive,forecast=2 \
  5,after=fading,forecast=2 none,deep=3,forecast=3,rule=chebyshev none,deep=3,forecast=3,unguided=1 none,deep=2,unguided=1
REUSES := --gate 10,sp=5,warm=2 --gate 10,deep=3

bench-rows: $(READY)
	$(BIN)/tgate-build --model shapes --output bundles/bench-rows --graphs vanilla,planning,fidelity $(REUSES)
	$(BIN)/tgate-bench run bundles/bench-rows $(ROW_GATES:%=--gate %) --fewer-steps 8,10,12,15,18 --rounds 10 --quality --samples 102 --no-memory \
	  $(call results,rows-shapes) --plot $(RESULTS)/rows-shapes.png
	rm -f $(RESULTS)/tuning-shapes.json
	$(BIN)/tgate-analyze tune bundles/bench-rows --budget 0.5 --scheduler dpm++ --json $(RESULTS)/tuning-shapes.json \
	  --plot $(RESULTS)/tuning-shapes.png
	$(BIN)/tgate-build --model sd15 --random-weights --height 256 --width 256 --output bundles/bench-rows-sd15 --no-verify --no-components \
	  --graphs vanilla,planning,fidelity --gate none,deep=3
	$(BIN)/tgate-bench run bundles/bench-rows-sd15 --gate 7,after=positive,forecast=2 --gate none,deep=3,forecast=3,unguided=1 \
	  --gate 5,after=positive,forecast=2 --rounds 2 --no-memory $(call results,rows-sd15)

# `tgate-bench growth` would continue from the file of its last run: without it, all is measured anew.
bench-models: $(READY)
	$(BIN)/tgate-bench macs $(call results,macs)
	rm -f $(RESULTS)/growth.json
	$(BIN)/tgate-bench growth $(call results,growth) --plot $(RESULTS)/growth.png

# A server of the demo model under load; a quarter of an hour.
load: $(READY)
	$(BIN)/tgate-build --model shapes --output $(DEMO_BUNDLE) --backend onnxruntime
	$(BIN)/tgate-bench load $(DEMO_BUNDLE) --backend onnxruntime $(call results,load)

bench-sd15: $(READY)
	$(BIN)/tgate-build --model sd15 --random-weights --height 256 --width 256 --output bundles/bench-sd15 $(EVERY_GRAPH) --no-verify
	$(BIN)/tgate-bench run bundles/bench-sd15 --backend onnxruntime --gate-step 5,10 --beside official --rounds 3 \
	  $(call results,bench-sd15) --plot $(RESULTS)/bench-sd15.png

# Where Python has the packages already and there is no network: `make bench-gpu READY= BIN=FOLDER_OF_ITS_COMMANDS`.
# Each part takes less than ten minutes on an H100 and can be run alone. A part that fails is recorded, and the next one runs.
GPU_PARTS    := probe tests sanitizer kernels sd15 sdxl
.PHONY: $(addprefix bench-gpu-,$(GPU_PARTS))
GPU_BACKENDS ?= pytorch
GPU_ROUNDS   ?= 10
# Its report of errors that the tests provoke on purpose is off; PyTorch's own blocks of memory would hide every access outside a tensor.
SANITIZER    := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1

bench-gpu: $(READY)
	@failed=; for part in $(GPU_PARTS); do $(MAKE) bench-gpu-$$part || failed="$$failed $$part"; done; \
	  echo "parts run: $(GPU_PARTS); failed:$${failed:- none}" | tee $(RESULTS)/gpu-parts.txt; test -z "$$failed"

# Runs a command, keeps its output in a file of results, shows it, and ends with its exit status.
kept = { $(1); } > $(RESULTS)/$(2).txt 2>&1; status=$$?; cat $(RESULTS)/$(2).txt; exit $$status
PYTEST_GPU := $(BIN)/pytest -m gpu -q --no-header --tb=line -rfEs -p no:cacheprovider

bench-gpu-probe: $(READY)
	$(BIN)/tgate-bench probe $(call results,gpu-probe)

bench-gpu-tests: $(READY)
	$(call kept,$(PYTEST_GPU),gpu-tests)

bench-gpu-sanitizer: $(READY)
	$(call kept,$(SANITIZER) $(PYTEST_GPU) tests/kernels && TORCH_CUDA_SANITIZER=1 $(PYTEST_GPU) tests/kernels tests/engines,gpu-sanitizer)

bench-gpu-kernels: $(READY)
	$(BIN)/tgate-bench kernels --rounds 20 $(call results,gpu-kernels)

bench-gpu-sd15 bench-gpu-sdxl: bench-gpu-%: $(READY)
	$(BIN)/tgate-build --model $* --random-weights --precision fp16 --no-verify --no-components --output bundles/gpu-$* \
	  --graphs vanilla,planning,fidelity $(addprefix --backend ,$(GPU_BACKENDS))
	$(BIN)/tgate-bench steps bundles/gpu-$* --rounds 20 $(call results,gpu-steps-$*)
	$(BIN)/tgate-bench run bundles/gpu-$* --gate-step 5,10 --beside eager,graphs,channels-last,cutoff,official --rounds $(GPU_ROUNDS) \
	  --no-memory $(call results,gpu-$*) --plot $(RESULTS)/gpu-$*.png

clean:
	rm -rf $(VENV) .typing bundles pictures build *.egg-info
