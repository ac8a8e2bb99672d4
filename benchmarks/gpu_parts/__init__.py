"""The parts of `benchmarks/gpu.sh`: tests, step times, a comparison and spectra on one GPU."""
