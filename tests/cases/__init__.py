"""One table of cases a family, for the tests of every backend and for the benchmarks' checks."""
