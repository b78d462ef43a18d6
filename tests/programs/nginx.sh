#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Serves a page, and fetches it.
set -eu
mkdir -p /tmp/www
echo 'a page' >/tmp/www/index.html
cat >/tmp/nginx.conf <<'END'
user www-data;
worker_processes 2;
pid /tmp/nginx.pid;
error_log /tmp/nginx.log;
events {}
http {
    access_log off;
    server { listen unix:/tmp/nginx.sock; root /tmp/www; }
}
END
nginx -c /tmp/nginx.conf
curl -sS --unix-socket /tmp/nginx.sock http://localhost/
curl -sS -o /dev/null -w '%{http_code}\n' --unix-socket /tmp/nginx.sock http://localhost/nothing
nginx -c /tmp/nginx.conf -s quit
