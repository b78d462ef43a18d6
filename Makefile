# SPDX-License-Identifier: Apache-2.0
# The one entry to Bulkhead: `make run`, `make test`, `make bench`,
# `make install`. Every target installs and builds what it needs; what is
# built already is not built again.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PREFIX ?= /usr/local
# systemd reads units of /usr/local too.
UNITS ?= $(PREFIX)/lib/systemd/system
KSM_UNIT := runtime/ksm-throttler/systemd/bulkhead-ksm-throttler.service
MAN8 := $(PREFIX)/share/man/man8
COMPLETIONS := $(PREFIX)/share/bash-completion/completions
GUEST := target/guest
RELEASE := target/release

# What a fresh Debian 12 lacks, by what it is for: the kernel's build, the
# guest image, the end-to-end tests and the KVM host in a box.
PACKAGES := ca-certificates build-essential bc bison flex libelf-dev libssl-dev kmod cpio xz-utils lz4 rsync \
	erofs-utils busybox-static \
	containerd containernetworking-plugins runc crun iproute2 iptables \
	qemu-system-x86 strace

# crictl and critest are built with any Go; golang-go where there is none.
#
# Debian 12's own Rust is too old; its -web packages carry a current one.
RUST_PACKAGES := rustc-web cargo-web
RUST_OLDEST := 1.86.0

.PHONY: help deps build binaries guest kernel run test test-agent test-agent-load test-guest-load test-programs test-posix test-io test-containerd test-docker critest soak box bench fuzz install uninstall

help: ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

deps: ## Installs the packages that building and testing need (root)
	@missing=""; \
	for package in $(PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}' "$$package" 2>/dev/null | grep -qx installed || missing="$$missing $$package"; \
	done; \
	have=$$(cargo --version 2>/dev/null | cut -d' ' -f2 || true); \
	if [ "$$(printf '%s\n' "$(RUST_OLDEST)" "$${have:-0}" | sort -V | head -n1)" != "$(RUST_OLDEST)" ]; then \
		missing="$$missing $(RUST_PACKAGES)"; \
	fi; \
	command -v go >/dev/null || missing="$$missing golang-go"; \
	if [ -n "$$missing" ]; then \
		echo "installing:$$missing"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -q >/dev/null; \
		apt-get install -yq --no-install-recommends $$missing >/dev/null; \
	fi

build: deps binaries guest ## Builds the binaries, the guest kernel and the guest image

binaries:
	@echo "binaries: with cargo, some minutes the first time"
	@cargo build --release -p bulkhead-runtime -p bulkhead-ksm-throttler -p containerd-shim-bulkhead-v2 -p bulkhead-rootfs-builder -p bulkhead-tests
	@cargo rustc --release -p bulkhead-vmm --bin bulkhead-vmm -- -C target-feature=+crt-static
	@cargo rustc --release -p bulkhead-agent --bin bulkhead-agent -- -C target-feature=+crt-static -C relocation-model=static

kernel:
	@guest-kernel/build

guest: binaries kernel
	@$(RELEASE)/bulkhead-rootfs-builder --agent $(RELEASE)/bulkhead-agent --out $(GUEST)

run: build ## Runs a container in its own microVM through containerd
	@$(RELEASE)/bulkhead-demo

test: build ## Runs every test: unit tests, tiny guests, end to end
	@tests/cri-tools/build crictl || true # its tests say then that they were skipped, and why
	@tests/run

test-containerd: build ## End-to-end tests with another containerd (CONTAINERD=v2.3.4, ONLY=NAMEPART, BULKHEAD_SANDBOXER=shim); needs Go
	@dir=$$(tests/containerd/build $(or $(CONTAINERD),v2.3.4)) && \
		BULKHEAD_CONTAINERD="$$dir" cargo test -p bulkhead-tests --test e2e -- $(ONLY)

test-docker: build ## End-to-end tests with Docker's daemon (DOCKER=28.5.2); needs Go
	@dir=$$(tests/docker/build $(or $(DOCKER),28.5.2)) && \
		BULKHEAD_DOCKER="$$dir" cargo test -p bulkhead-tests --test e2e -- docker_

critest: build ## Runs the tests of cri-tools (FOCUS: only those cases); needs Go
	@tests/cri-tools/build crictl critest
	@$(RELEASE)/bulkhead-critest $(if $(FOCUS),'$(FOCUS)')

soak: build ## Makes and removes 200 pods, four at a time (PODS); nothing may be left
	@tests/cri-tools/build crictl
	@BULKHEAD_SOAK=$(or $(PODS),200) cargo test -p bulkhead-tests --test e2e -- pods_come_and_go

soak-restores: deps ## Makes 10,000 machines of a snapshot in one process (RESTORES); it may keep nothing
	@BULKHEAD_RESTORES=$(or $(RESTORES),10000) cargo test -p bulkhead-vmm --test restores -- --nocapture

test-agent: ## Runs the agent's own tests, without a virtual machine (root)
	@cargo test -p bulkhead-agent

test-agent-load: ## The same of many containers and processes, in full numbers
	@BULKHEAD_AGENT_LOAD=full cargo test -p bulkhead-agent --test robust -- --test-threads 1 --nocapture

test-guest-load: build ## Full numbers of containers and processes in one guest; takes long
	@BULKHEAD_AGENT_LOAD=full cargo test -p bulkhead-tests --test e2e -- very_many fork_bombs

test-programs: build ## Real programs of Debian packages, unchanged, in containers and in microVMs (Debian mirror; 1 GB)
	@root=$$(tests/programs/build) && export BULKHEAD_PROGRAMS="$$root" && \
		cargo test -p bulkhead-agent --test programs && \
		cargo test -p bulkhead-tests --test e2e -- program_

test-posix: build ## POSIX behaviour of a shared directory, by pjdfstest of crates.io, beside the host's
	@suite=$$(tests/posix/build) && \
		BULKHEAD_POSIX="$$suite" cargo test -p bulkhead-tests --test e2e -- posix_

test-io: build ## fio on disks and shared directories, iperf3 over the network, bytes over vsock (Debian mirror)
	@built=$$(tests/io/build) && \
		BULKHEAD_IO="$$built" cargo test -p bulkhead-tests --test e2e -- fio_ iperf_ vsock_

box: build ## A shell in the KVM host in a box
	@$(RELEASE)/bulkhead-box shell

bench: build ## Prints the figures, also to target/bench.json
	@$(RELEASE)/bulkhead-bench

# Coverage as libFuzzer wants it, with a stable compiler; the target is named so
# that build scripts go without.
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares
FUZZ_TARGET := x86_64-unknown-linux-gnu
FUZZ_SECONDS ?= 60

fuzz: deps ## Runs each fuzz target of VMM and agent for a minute (FUZZ_SECONDS)
	@for crate in vmm:snapshot,control,pci,blk,net,vsock,kernel,mem,fs,console,small,function,restore agent:specification,request,answer; do \
		cd "$(CURDIR)/$${crate%%:*}/fuzz"; \
		RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --release --target $(FUZZ_TARGET); \
		targets=$${crate#*:}; \
		for target in $${targets//,/ }; do \
			echo "fuzz: $${crate%%:*} $$target"; \
			mkdir -p corpus/$$target artifacts; \
			case $$target in fs) apart="unshare --user --map-root-user";; *) apart="";; esac; \
			$$apart target/$(FUZZ_TARGET)/release/$$target corpus/$$target seeds/$$target -artifact_prefix=artifacts/$$target- \
				-max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 2>&1 | tail -n 12; \
		done; \
	done

install: build ## Installs to PREFIX (/usr/local)
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/bulkhead $(RELEASE)/bulkhead-vmm $(RELEASE)/containerd-shim-bulkhead-v2 $(RELEASE)/bulkhead-ksm-throttler
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/bulkhead $(GUEST)/vmlinux $(GUEST)/rootfs.erofs $(GUEST)/rootfs.cpio
	$(RELEASE)/bulkhead man $(DESTDIR)$(MAN8)
	install -d -m 755 $(DESTDIR)$(COMPLETIONS)
	$(RELEASE)/bulkhead completion bash >$(DESTDIR)$(COMPLETIONS)/bulkhead
	install -d -m 755 $(DESTDIR)$(UNITS)
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' $(KSM_UNIT) >$(DESTDIR)$(UNITS)/$(notdir $(KSM_UNIT))
	chmod 644 $(DESTDIR)$(UNITS)/$(notdir $(KSM_UNIT))

uninstall: ## Removes what install put there
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,bulkhead bulkhead-vmm containerd-shim-bulkhead-v2 bulkhead-ksm-throttler)
	rm -f $(DESTDIR)$(UNITS)/$(notdir $(KSM_UNIT)) $(DESTDIR)$(MAN8)/bulkhead*.8 $(DESTDIR)$(COMPLETIONS)/bulkhead
	rm -rf $(DESTDIR)$(PREFIX)/share/bulkhead
