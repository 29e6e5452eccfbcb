#!/bin/sh
# Budgets from one float checkpoint. Usage: sh recipes/bccd_retinanet/sweep.sh DATA CHECKPOINT [more overrides]
set -e
data=$1
checkpoint=$2
shift 2
exec hawq-lightning -m experiment=bccd_retinanet data.root="$data" model.weights="$checkpoint" float_epochs=0 \
  select.budget=8x,10x,12x seed=1,2 "$@"
