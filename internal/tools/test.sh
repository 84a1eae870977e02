#!/bin/bash
# test.sh: everything that `make test` runs, one stage after the other, all of them even if one fails,
# and a last line with the sum. Environment: STAGES (default "vet host race mutants guest").
set -u
cd "$(dirname "$0")/../.." || exit 1
mkdir -p bin
passed=0 failed=0
gotestsum=gotest.tools/gotestsum@v1.13.0

# The race stage leaves out tests in which one goroutine, or a program without the detector, does everything: the host stage
# runs them. Each pattern is for whole names.
not_race='
TestAgainstModel TestCheckKeepsNoSpace TestChunkMadeForNothing TestChunksOfHolesGo
TestCleanLeavesOutWhatIsDead TestColdGains TestColdLeavesDamage TestColdPassesOverWhatCannotBeRead
TestColdShared TestCompressRoundTrip TestCutInCreate TestCuts TestDamage TestDamaged.*
TestDeadNeighboursComeBack TestDurableOverNBD TestEveryCallOfTheCopyFails TestEveryCutInACommit
TestExamples TestFaultAtEveryByteOfControl TestFaultAtEveryCall TestFaultAtEveryRingCall
TestFaultAtEverySocketCall TestFaultInCommands TestForeignDevices TestFramesDamaged TestFullDisk
TestFullStore.* TestGoldenOrder TestHeal.* TestHiddenVolume TestKill TestLayers
TestLookKeepsTheLastRecord TestLostRanges TestLostTable TestMendTable TestMoreChunksThanDescriptors
TestOracleTrusts TestOrderOf.* TestPartsOfUnits TestPromises TestReadOnlyStore
TestReadsDoNotAllocate TestReceiveRefuses TestRemoveWithVeryManySnapshots TestReplayOfMoreThanFits
TestRoundsLeaveNoSpace TestSectorsOfOneBlock TestSendAsStored TestSendReceive TestSizes TestSoak
TestSpaceComesBack TestTableCannotFillTheDisk TestUnchangedIsUnchanged TestWrongTable
TestScripts/(arguments|backup|badleaf|badstore|bench|check_repair|completion|damage|diff|events|flatten|foreign|formats|full|gc|holds|images|json|kept|ls|man|metadata|names|newest|nosuch|operations|overwrite|patterns|qemu|rbd|readonly|repair|retention|salvage|send|snapshots|space|stream|streams|transfer|usage|volumes|web)
'

stage() { printf '\n=== %s\n' "$*"; }

count() { # output: adds up gotestsum's last line, "DONE 12 tests, 1 skipped, 2 failures in 3s"
	local line n f s
	line=$(grep -aE '^DONE [0-9]+ tests' "$1" | tail -1)
	n=$(sed -nE 's/^DONE ([0-9]+) tests.*/\1/p' <<<"$line")
	f=$(sed -nE 's/.* ([0-9]+) failures?.*/\1/p' <<<"$line")
	s=$(sed -nE 's/.* ([0-9]+) skipped.*/\1/p' <<<"$line")
	passed=$((passed + ${n:-0} - ${f:-0} - ${s:-0}))
	failed=$((failed + ${f:-0}))
}

gotest() { # name flags...
	local out=bin/$1.out json=bin/$1.json status
	shift
	go run "$gotestsum" --format pkgname --hide-summary skipped --jsonfile "$json" -- "$@" 2>&1 | tee "$out"
	status=${PIPESTATUS[0]}
	count "$out"
	if [ "$status" != 0 ] && ! grep -qaE '^DONE .* failures?' "$out"; then
		failed=$((failed + 1)) # it did not build, or a package died
	fi
}

run() {
	if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}

formatted() {
	local bad
	bad=$(gofmt -l $(git ls-files '*.go'))
	[ -z "$bad" ] || { echo "gofmt would change: $bad"; return 1; }
}

# The user headers of the newest kernel, which package ublk's ABI is compiled against. Under CI the test fails without.
get_headers() {
	[ -z "${VDISK_UAPI:-}" ] || return 0
	if VDISK_UAPI=$(go run ./internal/guest/cmd/guest headers); then
		export VDISK_UAPI
	else
		unset VDISK_UAPI
		echo "*** NOT TESTED: ublk's ABI against the kernel's header, which is not available here (the reason is above)."
	fi
}

# prepare_guest gets the parts of the virtual machine, while the tests of another stage run. What it cannot get is no
# failure yet: the guest stage tries again, and says why.
prepare_guest() {
	go run ./internal/guest/cmd/guest build newest >bin/guest-build.out 2>&1 &
	preparing=$!
}

stages=${STAGES:-vet host race mutants guest} preparing=
for s in $stages; do
	case $s in
	vet)
		stage "gofmt, go vet"
		run formatted
		run go vet ./...
		;;
	host)
		stage "tests on this machine"
		get_headers
		gotest host -count=1 -timeout 25m ./...
		echo "power-cut test: $(grep -aoE 'crash states: [0-9]+' bin/host.json | tail -1)"
		;;
	race)
		stage "tests with the race detector (short)"
		get_headers
		[[ " $stages " != *" guest "* ]] || prepare_guest
		gotest race -skip "$(grep -oE '[^ ]+' <<<"$not_race" | sed 's/.*/^&$/' | paste -sd '|')" -race -short -vet=off -count=1 -timeout 25m ./... # the stages before have vetted it
		;;
	mutants)
		stage "mutants of the small packages"
		run go run ./internal/tools/mutants -parallel 2 -choose 44 -package '^\./(format|metadata|cow/internal/.*)$' testdata/mutants/*.txt
		;;
	guest)
		stage "tests in a guest with ublk"
		[ -z "$preparing" ] || wait "$preparing" || echo "guest: $(tail -n 1 bin/guest-build.out)"
		go run ./internal/guest/cmd/guest test ${GUEST_FLAGS:--kernel newest -short -timeout 25m} ./ublk ./ublk/examples/ram ./ublk/examples/loop ./internal/e2e ./internal/powercut 2>&1 | tee bin/guest.out
		status=${PIPESTATUS[0]}
		line=$(grep -aE '^guest: [0-9]+ passed, [0-9]+ failed' bin/guest.out | tail -1)
		if [ "$status" = 77 ] && [ -z "${CI:-}" ]; then
			echo "*** NOT TESTED: ublk. No guest can be had on this machine (the reason is above)."
			echo "*** Everything that needs the kernel's ublk driver is untested by this run."
		elif [ -z "$line" ]; then
			failed=$((failed + 1))
		else
			# What failed is said once more, below the many lines of the kernel.
			[ "$status" = 0 ] || grep -aE -B 30 -A 5 '^ *--- FAIL|^FAIL:|^panic:' bin/guest.out | tail -n 150
			read -r p f < <(sed -E 's/^guest: ([0-9]+) passed, ([0-9]+) failed.*/\1 \2/' <<<"$line")
			passed=$((passed + p)) failed=$((failed + f))
			[ "$status" = 0 ] || [ "$f" -gt 0 ] || failed=$((failed + 1))
		fi
		;;
	*)
		echo "no stage $s" >&2
		exit 2
		;;
	esac
done

printf '\n%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
