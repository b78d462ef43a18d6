#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes a database, and asks it.
set -eu
bin=$(echo /usr/lib/postgresql/*/bin)
as() { setpriv --reuid postgres --regid postgres --init-groups env HOME=/tmp "$@"; }
install -d -o postgres -g postgres /tmp/pg
cd /tmp
as "$bin/initdb" -D /tmp/pg/data -A trust >/dev/null
as "$bin/pg_ctl" -D /tmp/pg/data -l /tmp/pg/log -o "-k /tmp/pg -c listen_addresses=" -w -t 600 start >/dev/null
ask() { as "$bin/psql" -h /tmp/pg -qtAc "$1" postgres; }
ask 'create table t as select n from generate_series(1, 1000) n'
ask 'select sum(n) from t'
as "$bin/pg_ctl" -D /tmp/pg/data -m fast -w -t 600 stop >/dev/null
