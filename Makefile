# Two commands on a fresh machine: `make demo` shows what vdisk does, `make test` proves it.
# Both install what they need (as root, with apt-get) and say so when they cannot.

GO ?= go
export CGO_ENABLED ?= 1
TOOLS = internal/tools
PREFIX ?= /usr/local
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)
LINT = github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

.DEFAULT_GOAL = build
.PHONY: help build install demo test guest-test recovery-test power-test marks-test crash-test damage-test fault-test kill-test linear-test full-test vm-test proof soak fuzz mutants bench bench-report bench-engine bench-limits bench-import bench-ublk bench-guest bench-space deb deb-test deb-guest-test web-test lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/vdisk
	@$(TOOLS)/setup.sh build
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-X main.described=$(VERSION)' -o bin/vdisk ./cmd/vdisk

install: ## the program, its manual pages, completions, systemd units and udev rule, below DESTDIR and PREFIX (/usr/local)
	@[ -x bin/vdisk ] || $(MAKE) build
	install -D -m 755 bin/vdisk $(DESTDIR)$(PREFIX)/bin/vdisk
	$(DESTDIR)$(PREFIX)/bin/vdisk man $(DESTDIR)$(PREFIX)/share/man/man8
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	bin/vdisk completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/vdisk
	bin/vdisk completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_vdisk
	bin/vdisk completion fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/vdisk.fish
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	for unit in init/*.service init/*.socket init/*.timer; do \
		sed 's|/usr/local/bin/|$(PREFIX)/bin/|' $$unit > $(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit#init/} && \
			chmod 644 $(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit#init/} || exit 1; \
	done
	install -D -m 644 init/grafana-dashboard.json $(DESTDIR)$(PREFIX)/share/doc/vdisk/grafana-dashboard.json
	install -D -m 644 init/60-vdisk.rules $(DESTDIR)$(PREFIX)/lib/udev/rules.d/60-vdisk.rules
	install -D -m 644 init/modules-load.conf $(DESTDIR)$(PREFIX)/lib/modules-load.d/vdisk.conf

deb: ## a Debian package of the commit that is checked out, in bin/ (deb.sh)
	@$(TOOLS)/setup.sh build deb
	@$(TOOLS)/deb.sh bin

deb-test: ## the package is the same in two builds, and lintian has nothing to say (deb-test.sh)
	@$(TOOLS)/setup.sh build deb-test
	@$(TOOLS)/deb-test.sh

deb-guest-test: ## the package in a guest under systemd (KERNEL), over an upgrade, a kill and a reboot (deb-guest.sh)
	@$(TOOLS)/setup.sh build deb
	@$(TOOLS)/deb-guest.sh

web-test: ## the page of a daemon in headless Chromium, under load; leaves pictures in bin/web
	@$(TOOLS)/setup.sh build web-test
	VDISK_WEB_TEST=1 VDISK_WEB_SHOTS=$(CURDIR)/bin/web $(GO) test -count=1 -timeout 10m -run TestBrowser ./internal/web

demo: build ## the main job, on a real file system image; under three minutes
	@$(TOOLS)/setup.sh demo
	@$(TOOLS)/demo.sh

test: ## all tests; those of the block device in a VM, where one can be had
	@$(TOOLS)/setup.sh build test
	@$(TOOLS)/test.sh

guest-test: build ## the block device on all kernels, in full
	@STAGES=guest GUEST_FLAGS="-kernel all -timeout 40m" $(TOOLS)/test.sh

recovery-test: build ## 200 kills and 20 upgrades of a block device's server, on all kernels; an hour each
	@for k in newest stable; do \
		$(GO) run ./internal/guest/cmd/guest run -kernel $$k -timeout 3h -bin bin/vdisk -file recovery.sh=testdata/guest/30-recovery.sh -- \
			env RECOVERY_KILLS=200 RECOVERY_AGAIN=50 RECOVERY_UPGRADES=20 bash /payload/recovery.sh || exit 1; \
	done

power-test: ## CUTS (200) power cuts of the disk below a store, in a guest (KERNEL); about half a minute each
	@$(GO) run ./internal/guest/cmd/guest test -kernel $(or $(KERNEL),newest) -timeout 4h -scripts none \
		-env VDISK_POWER_CUTS=$(or $(CUTS),200) -run 'TestPowerCuts$$' ./internal/powercut

marks-test: ## the disk as of every flush and write with FUA of a recorded load, in a guest (KERNEL); two hours at most
	@$(GO) run ./internal/guest/cmd/guest test -kernel $(or $(KERNEL),newest) -timeout 2h -scripts none \
		-env VDISK_POWER_SYNCS=32 -env VDISK_POWER_STATES=0 -run 'TestLoggedWrites$$' ./internal/powercut

crash-test: ## the engine's power-cut test over STATES (200,000) crash states
	$(GO) test -count=1 -timeout 12h -v -run 'Crash' ./cow -crash.states=$(or $(STATES),200000)

kill-test: ## the server over NBD is killed KILLS (1000) times, mostly when something is half done
	@$(TOOLS)/setup.sh test
	$(GO) test -count=1 -timeout 6h -v -run 'TestKill$$' ./internal/e2e -kills $(or $(KILLS),1000)

soak: build ## everything at once over NBD for HOURS (1), with kills; SOAK_DIR keeps the sums, so that pieces add up
	$(GO) build -o bin/soak ./internal/tools/soak
	bin/soak -vdisk bin/vdisk -dir "$(or $(SOAK_DIR),bin/soak.d)" -hours "$(or $(HOURS),1)" $(SOAK_FLAGS)

fuzz: ## every fuzz target for FUZZTIME (10m) each, two at once; TARGETS, a regular expression, chooses some
	@$(TOOLS)/setup.sh build
	@$(GO) run ./internal/tools/fuzz -time $(or $(FUZZTIME),10m) -targets '$(TARGETS)'

fault-test: ## every fault of the disk and of the peers at every call: the engine, whole commands, the servers; hours
	VDISK_FAULTS=all $(GO) test -v -count=1 -timeout 12h -run 'Fault' ./cow ./metadata ./internal/storage ./cmd/vdisk ./nbd ./ublk ./internal/owner

damage-test: ## every byte of every structure of a store damaged, its files cut, removed and exchanged
	$(GO) test -count=1 -timeout 3h -v -run 'TestDamaged(OwnerFile|Files|Bytes)$$' ./cow -damage.every

vm-test: build ## ten virtual machines on clones of one image, over NBD and in a guest as block devices; beside qcow2 (testdata/vm)
	@$(TOOLS)/setup.sh vm
	@GUEST=1 testdata/vm/run.sh

linear-test: build ## histories of concurrent clients: of the engine, over NBD and, in a guest, over ublk
	@$(TOOLS)/setup.sh test
	VDISK_LINEAR=1000 $(GO) test -count=1 -v -timeout 2h -run 'TestLinearizable$$' ./cow
	VDISK_LINEAR=400 $(GO) test -count=1 -v -timeout 2h -run 'TestLinearizableNBD$$|TestRegisters$$' ./cow ./internal/e2e
	$(GO) run ./internal/guest/cmd/guest test -kernel newest -timeout 1h -scripts none -env VDISK_LINEAR=24 -run 'TestRegisters$$' ./internal/e2e

full-test: build ## full stores of 1 GiB (VDISK_FULL_SIZE): over NBD, and a block device in a guest (KERNEL)
	@$(TOOLS)/setup.sh test
	VDISK_FULL_SIZE=$(or $(VDISK_FULL_SIZE),1G) $(GO) test -count=1 -run '^TestScripts$$/^fullnbd$$' ./cmd/vdisk
	$(GO) run ./internal/guest/cmd/guest run -kernel $(or $(KERNEL),newest) -timeout 40m -bin bin/vdisk -file full.sh=testdata/guest/full/ublk.sh -- \
		env VDISK_FULL_SIZE=$(or $(VDISK_FULL_SIZE),1G) bash /payload/full.sh

mutants: ## break the program on purpose, a line at a time: a test must notice each. What was killed is kept, unless FRESH=1
	@$(TOOLS)/setup.sh build test
	@mkdir -p bin && $(if $(FRESH),rm -f bin/mutants.txt,true)
	@$(GO) build -o bin/mutants ./internal/tools/mutants
	@bin/mutants -base -results bin/mutants.txt $(MUTANTS_FLAGS) testdata/mutants/*.txt

proof: ## the long forms of all tests of promises, in pieces (STEPS), and a table of what they went through (proof.sh)
	@$(TOOLS)/proof.sh

bench: build ## vdisk beside qemu-nbd (qcow2, raw) and nbdkit: writes docs/bench.md. ROUNDS (3), SECONDS (2), SIZE_MB (512), DIR; goes on after a break, unless FRESH=1
	@$(TOOLS)/setup.sh bench
	@$(GO) build -o bin/bench ./internal/tools/bench
	@bin/bench run -rounds "$(or $(ROUNDS),3)" -seconds "$(or $(SECONDS),2)" -size "$(or $(SIZE_MB),512)" -snapshots "$(or $(SNAPSHOTS),1000)" \
		-clones "$(or $(CLONES),100)" -limit "$(or $(LIMIT),28m)" -dir "$(DIR)" $(if $(FRESH),-fresh)

bench-report: ## docs/bench.md and its plots again, from what was measured
	@$(TOOLS)/setup.sh build bench
	@$(GO) run ./internal/tools/bench report

bench-engine: ## the engine alone; benchstat reads the output
	$(GO) test -run '^$$' -bench . -count 5 ./cow/...

bench-limits: build ## how well limits hold, and what a limited neighbour costs, over NBD (bench-limits.sh)
	@$(TOOLS)/setup.sh test
	@$(TOOLS)/bench-limits.sh

bench-import: build ## the import of 8 GiB, beside cp and qemu-img convert; needs root (bench-import.sh)
	@$(TOOLS)/setup.sh test
	@$(TOOLS)/bench-import.sh

bench-ublk: build ## block devices in a guest, against ublksrv if UBLKSRV_DIR has it (bench-ublk.sh)
	@$(TOOLS)/bench-ublk.sh

bench-guest: build ## block devices in a guest, beside dm-thin, dm-vdo, lvm, btrfs and others: adds them to docs/bench.md (bench-guest.sh)
	@$(TOOLS)/setup.sh bench
	@$(TOOLS)/bench-guest.sh

bench-space: build ## the space that a Debian root file system takes, beside qcow2; needs root and debootstrap
	@$(TOOLS)/bench-space.sh

lint: ## what a change must pass beside the tests (.golangci.yml)
	$(GO) run $(LINT) run ./...

clean: ## remove bin/
	rm -rf bin
