#!/bin/sh
# One core a rank, as tests.launching gives it: threads follow the cores, and threads change bits.
exec taskset -c $((${SLURM_PROCID:-0} % $(nproc))) "$@"
