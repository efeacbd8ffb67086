# Thin verbs over ./dev, which does the work; ARGS goes to the verb: make test ARGS="-k noise".
.DEFAULT_GOAL := help
.PHONY: help setup check test test-gpu finetune bench gpu bench-kernels

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## create .venv with everything the tests need
	@./dev venv test

check: ## ruff format --check, ruff check, mypy
	@./dev check

test: ## check, then the tests (CPU and Triton's interpreter)
	@./dev test $(ARGS)

test-gpu: ## only the tests that need a GPU
	@./dev test -m gpu $(ARGS)

finetune: ## fine-tune a classifier and prune its LoRA ranks
	@./dev finetune $(ARGS)

bench: ## time optimizer steps against their peers
	@./dev bench $(ARGS)

gpu: ## on a GPU: are the kernels right, and how fast are they?
	@./dev gpu $(ARGS)

bench-kernels: ## compile the kernels for GPUs that need not be there: registers, spills
	@./dev bench-kernels $(ARGS)
