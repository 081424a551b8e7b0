# Benchmarks are commands of their own, never asserts in tests.
.PHONY: bench

bench: build bundle ## Measure starts, execs and idle memory against runc in the same run (ROUNDS=10)
	@integration/devbox up
	@integration/bench --rounds $(or $(ROUNDS),10)
