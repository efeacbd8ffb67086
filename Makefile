# Thin verbs over ./dev, which does the work; ARGS goes to the verb: make test ARGS="-k noise".
.DEFAULT_GOAL := help
.PHONY: help setup check test test-gpu finetune bench bench-kernels

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

bench-kernels: ## time the Triton kernels on a GPU, or read their machine code
	@./dev bench-kernels $(ARGS)
