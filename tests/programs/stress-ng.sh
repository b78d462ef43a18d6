#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Load of many kinds; stress-ng checks results itself (--verify).
set -eu
cd /tmp
stress-ng --verify --cpu 1 --vm 1 --vm-bytes 16m --fork 1 --pipe 1 --mmap 1 --mmap-bytes 16m --switch 1 \
    --sem 1 --shm 1 --shm-bytes 1m --mq 1 --timer 1 --hdd 1 --hdd-bytes 4m --timeout 5s 2>&1 |
    grep -o 'successful run completed'
