#!/bin/sh
# Budgets by seeds: eight runs, one after the other. Usage: sh recipes/inceptionv3_imagenet/sweep.sh DATA [more overrides]
set -e
data=$1
shift
exec hawq-lightning -m experiment=inceptionv3_imagenet data.root="$data" trainer=gpu \
  "select.budget={weights:8x,act:7.6x},{weights:10.67x,act:7.6x},{weights:12.04x,act:7.6x},{weights:14x,act:7.6x}" seed=1,2 "$@"
