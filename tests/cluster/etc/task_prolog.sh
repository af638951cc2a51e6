#!/bin/bash
# What Slurm prints into a task's environment. With ConstrainDevices=yes, the usual setting, each task sees its own GPU
# as number 0; there are no cgroups here, so this numbers it so. The node's own number stays in REHEARSAL_DEVICE.
if [[ ${CUDA_VISIBLE_DEVICES:-} == [0-9] ]]; then
    echo "export REHEARSAL_DEVICE=$CUDA_VISIBLE_DEVICES"
    echo "export CUDA_VISIBLE_DEVICES=0"
fi
