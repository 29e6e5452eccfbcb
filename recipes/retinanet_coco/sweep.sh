#!/bin/sh
# The rows of Table 2 from one float checkpoint. Usage: sh recipes/retinanet_coco/sweep.sh DATA CHECKPOINT [more overrides]
set -e
data=$1
checkpoint=$2
shift 2
exec hawq-lightning -m \
  experiment=retinanet_coco,retinanet_coco_direct,retinanet_coco_act_mixed,retinanet_coco_act6 \
  data.root="$data" model.weights="$checkpoint" model.pretrained_backbone=false float_epochs=0 trainer=gpu "$@"
