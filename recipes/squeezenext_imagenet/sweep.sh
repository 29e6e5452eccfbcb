#!/bin/sh
# Budgets by seeds: eight runs, one after the other. Usage: sh recipes/squeezenext_imagenet/sweep.sh DATA [more overrides]
set -e
data=$1
shift
exec hawq-lightning -m experiment=squeezenext_imagenet data.root="$data" trainer=gpu \
  select.budget=8x,9.04x,9.40x,10x seed=1,2 "$@"
