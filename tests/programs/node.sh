#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A server, a client, a worker thread and a child.
set -eu
exec node -e '
const http = require("http"), { Worker } = require("worker_threads");
const server = http.createServer((_, answer) => answer.end("served"));
server.listen("/tmp/node.sock", () => http.get({ socketPath: "/tmp/node.sock" }, (answer) => {
    answer.on("data", (data) => {
        console.log(String(data));
        const worker = new Worker("require(\"worker_threads\").parentPort.postMessage(6 * 7)", { eval: true });
        worker.on("message", (sum) => {
            console.log(sum);
            console.log(String(require("child_process").execSync("echo child")).trim());
            server.close();
        });
    });
}));'
