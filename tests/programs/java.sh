#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Compiles a class and runs it, with threads and what it is told of the container.
set -eu
mkdir -p /tmp/java
cd /tmp/java
cat >Sum.java <<'END'
import java.util.stream.LongStream;

public class Sum {
    public static void main(String[] args) throws Exception {
        System.out.println(LongStream.rangeClosed(1, 100_000).parallel().sum());
        Process child = new ProcessBuilder("echo", "child").inheritIO().start();
        System.exit(child.waitFor());
    }
}
END
javac Sum.java
java -version 2>&1 | grep -c 'OpenJDK Runtime'
java Sum
