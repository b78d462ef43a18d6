#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds an image of two layers with overlayfs, and looks into it.
set -eu
mkdir -p /var/lib/containers
mount -t tmpfs tmpfs /var/lib/containers
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=overlay HOME=/root TMPDIR=/tmp
mkdir -p /tmp/build/root/bin
cd /tmp/build
cp /bin/busybox root/bin/busybox
cat >Dockerfile <<'END'
FROM scratch
COPY root /
RUN ["/bin/busybox", "mkdir", "/made"]
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox echo inside > /made/file"]
CMD ["/bin/busybox", "cat", "/made/file"]
END
buildah build -q --layers -t built . >/dev/null
container=$(buildah from built)
buildah info | grep -o '"GraphDriverName": "overlay"'
buildah run "$container" /bin/busybox cat /made/file
