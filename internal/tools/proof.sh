#!/bin/bash
# proof.sh: the long forms of all tests that a promise rests on, one step after the other, and a table of what they went
# through. A step's output is kept in PROOF_DIR (default bin/proof), and a step that has passed is not run again, so that
# the whole, which may take more than a day, can be run in pieces. FRESH=1 runs all anew. The steps mutants and soak keep
# what they did, too, so that one that was broken off goes on; the step power is eight runs, and each is kept.
#
# A test prints a figure as "proof: NAME: FIGURE", and only if nothing was lost, wrong or hung; otherwise it fails, and
# with it its step. Environment: STEPS (default: all), and those of the steps' targets in the Makefile.
set -u
cd "$(dirname "$0")/../.." || exit 1
dir=${PROOF_DIR:-bin/proof}
mkdir -p "$dir" || exit 1
all="crash power marks recovery kill fault damage linear mutants fuzz soak"

target() { # step: what make runs
	case $1 in
	crash) echo "crash-test STATES=${STATES:-1000000}" ;;
	power) echo "power-test CUTS=${CUTS:-25}" ;;
	marks) echo marks-test ;;
	recovery) echo recovery-test ;;
	kill) echo "kill-test KILLS=${KILLS:-1000}" ;;
	fault) echo fault-test ;;
	damage) echo damage-test ;;
	linear) echo linear-test ;;
	mutants) echo mutants ;;
	fuzz) echo "fuzz FUZZTIME=${FUZZTIME:-10m}" ;;
	soak) echo "soak HOURS=${HOURS:-4}" ;;
	*) return 1 ;;
	esac
}

pieces() { # step: the names of its runs
	case $1 in
	power) echo power.{1..8} ;;
	*) echo "$1" ;;
	esac
}

passed() { # run
	[ -s "$dir/$1.out" ] && tail -n 1 "$dir/$1.out" | grep -q '^proof.sh: passed'
}

for s in ${STEPS:-$all}; do
	t=$(target "$s") || { echo "no step $s; there are: $all" >&2; exit 2; }
	for run in $(pieces "$s"); do
		if passed "$run" && [ -z "${FRESH:-}" ]; then
			continue
		fi
		echo "=== make $t (output in $dir/$run.out)"
		start=$SECONDS
		# The words of $t are arguments.
		if make $t >"$dir/$run.out" 2>&1; then
			echo "proof.sh: passed in $((SECONDS - start)) s, $(git describe --always --dirty 2>/dev/null)" >>"$dir/$run.out"
		else
			echo "proof.sh: FAILED after $((SECONDS - start)) s" >>"$dir/$run.out"
			tail -n 20 "$dir/$run.out"
		fi
	done
done

bad=0
echo "| what | how much | lost flushed writes, wrong reads, hangs |"
echo "|---|---|---|"
for s in $all; do
	outputs=()
	for run in $(pieces "$s"); do
		outputs+=("$dir/$run.out")
		if ! passed "$run"; then
			bad=1
			[ -s "$dir/$run.out" ] && echo "| step $run | FAILED: $dir/$run.out | |" || echo "| step $run | not run | |"
			unset 'outputs[-1]'
		fi
	done
	[ ${#outputs[@]} -gt 0 ] || continue
	# A test may print a figure for each of its parts: the sum is what counts.
	cat "${outputs[@]}" | grep -aoE 'proof: [^:]+: [0-9].*' | awk -F ': ' '
		!($2 in order) { order[$2] = ++n; name[n] = $2 }
		{ text = $3; match(text, /^[0-9.]+/); sum[$2] += substr(text, 1, RLENGTH); rest[$2] = substr(text, RLENGTH + 1) }
		END { for (i = 1; i <= n; i++) printf "| %s | %.10g%s | 0, 0, 0 |\n", name[i], sum[name[i]], rest[name[i]] }'
done
exit $bad
