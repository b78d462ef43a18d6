#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prints what it reads back, and how many keys are in the file it saved.
set -eu
cd /tmp
redis-server --port 0 --unixsocket /tmp/redis.sock --dir /tmp --daemonize yes >/dev/null
until redis-cli -s /tmp/redis.sock ping >/dev/null 2>&1; do sleep 0.1; done
redis-cli -s /tmp/redis.sock set greeting hello
redis-cli -s /tmp/redis.sock get greeting
redis-cli -s /tmp/redis.sock save
redis-cli -s /tmp/redis.sock shutdown nosave
redis-check-rdb /tmp/dump.rdb | grep -c 'keys read'
