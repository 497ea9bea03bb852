#!/bin/sh
# A VITDIST_WRAP that lets the script's own questions through and puts a report of the rank in the training's place.
case "$*" in
  *"-m vitdist train"*) exec "$1" -m tests.slurm.probe "$@" ;;
esac
exec "$@"
