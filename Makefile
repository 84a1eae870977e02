# Two commands on a fresh machine: `make demo` shows what vdisk does, `make test` proves it.
# Both install what they need (as root, with apt-get) and say so when they cannot.

GO ?= go
export CGO_ENABLED ?= 1
TOOLS = internal/tools

.PHONY: build demo test guest-test recovery-test crash-test bench-engine bench-cleaner bench-depth bench-nbd bench-ublk bench-guest bench-space lint clean

build: ## bin/vdisk
	@$(TOOLS)/setup.sh build
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/vdisk ./cmd/vdisk

demo: build ## the main job, on a real file system image; under three minutes
	@$(TOOLS)/setup.sh demo
	@$(TOOLS)/demo.sh

test: ## everything, the guest with ublk included where one can be had
	@$(TOOLS)/setup.sh build test
	@$(TOOLS)/test.sh

guest-test: build ## ublk on real kernels, all of them
	@STAGES=guest GUEST_FLAGS="-kernel all -timeout 40m" $(TOOLS)/test.sh

recovery-test: build ## block devices outlive 200 kills and 20 upgrades of their server; on all kernels, about an hour each
	@for k in newest stable; do \
		$(GO) run ./internal/guest/cmd/guest run -kernel $$k -timeout 3h -bin bin/vdisk -file recovery.sh=testdata/guest/30-recovery.sh -- \
			env RECOVERY_KILLS=200 RECOVERY_AGAIN=50 RECOVERY_UPGRADES=20 bash /payload/recovery.sh || exit 1; \
	done

crash-test: ## the engine's power-cut test, long
	$(GO) test -count=1 -timeout 3h -run 'Crash' ./cow -crash.states=200000

bench-engine: ## the engine alone; benchstat reads the output
	$(GO) test -run '^$$' -bench . -count 5 ./cow

bench-cleaner: build ## what the cleaner costs who writes over NBD to a store that is nearly full; see bench-cleaner.sh
	@$(TOOLS)/setup.sh test
	@$(TOOLS)/bench-cleaner.sh

bench-depth: build ## what snapshots and clones cost who reads over NBD; see bench-depth.sh
	@$(TOOLS)/setup.sh test
	@$(TOOLS)/bench-depth.sh

bench-nbd: build ## against qemu-nbd (qcow2, raw) and nbdkit over NBD; see bench-nbd.sh
	@$(TOOLS)/setup.sh test
	@$(TOOLS)/bench-nbd.sh

bench-ublk: build ## block devices in a guest, against ublksrv where UBLKSRV_DIR has it; see bench-ublk.sh
	@$(TOOLS)/bench-ublk.sh

bench-guest: build ## block devices in a guest, against dm-thin, dm-vdo and others; see bench-guest.sh
	@$(TOOLS)/bench-guest.sh

bench-space: build ## what a Debian root file system takes, beside qcow2; needs root, debootstrap, qemu-img and the network
	@$(TOOLS)/bench-space.sh

lint:
	$(GO) vet ./...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
	files=$$($(GO) run mvdan.cc/gofumpt@v0.12.0 -l .) && echo "$$files" && [ -z "$$files" ]

clean:
	rm -rf bin
