#!/bin/bash
# bench-ublk.sh: our ublk targets, the kernel's null_blk and, where it is found, ublksrv's targets, measured in one boot
# of a guest in turns, and a table of medians. Environment, beside that of bench-common.sh (UBLKSRV_DIR, KERNEL, ICOUNT):
#   BENCH        "null", "file" or both (default); ROUNDS (3), RUNTIME (seconds a run, 3), FILE_MB (256)
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p bin
for example in null loop; do CGO_ENABLED=0 go build -trimpath -o bin/ "./ublk/examples/$example"; done
. internal/tools/bench-common.sh
flags+=(-bin bin/null -bin bin/loop -file bench.sh=testdata/guest/bench/ublk.sh)
out=bin/bench-ublk.out
go run ./internal/guest/cmd/guest run "${flags[@]}" -- env "GROUPS_=${BENCH:-null file}" "ROUNDS=${ROUNDS:-3}" "RUNTIME=${RUNTIME:-3}" \
	"FILE_MB=${FILE_MB:-256}" bash bench.sh | tee "$out" | grep --line-buffered -v '^R '
awk -f internal/tools/median.awk -f <(cat <<'AWK'
function ratio(x, y) { return y > 0 && x > 0 ? sprintf("%.2f", x / y) : "-" }
$1 == "R" {
	k = $3 " " $4
	if (!($2 " " $3 in seen)) { seen[$2 " " $3]; test[++tests] = $3; group[tests] = $2 }
	if (!(k in iops)) row[$2 " " $3] = row[$2 " " $3] " " $4
	iops[k] = iops[k] " " $6; p50[k] = p50[k] " " $7; cpu[k] = cpu[k] " " $8
}
END {
	for (i = 1; i <= tests; i++) {
		n = split(row[group[i] " " test[i]], target, " ")
		base = ""
		for (j = 1; j <= n; j++) if (target[j] ~ /ublksrv(.direct)?-[12]$/ && (base == "" || target[j] ~ /direct/)) base = test[i] " " target[j]
		if (base != "") { bi = median(iops[base]); bp = median(p50[base]); bc = median(cpu[base]) }
		printf "\n%-32s %9s %6s %9s %9s   against %s\n", group[i] " " test[i], "IOPS", "+-%", "p50 us", "CPU us/IO", (base == "" ? "-" : base)
		for (j = 1; j <= n; j++) {
			k = test[i] " " target[j]
			m = median(iops[k]); s = spread; p = median(p50[k]); c = median(cpu[k])
			printf "  %-30s %9.0f %6.1f %9.1f %9s   %s\n", target[j], m, s, p / 1000, (c > 0 ? sprintf("%.2f", c / 1000) : "-"), \
				(base == "" ? "" : "IOPS " ratio(m, bi) "  p50 " ratio(p, bp) "  CPU " ratio(c, bc))
			if (test[i] ~ /2-queues$/) {
				one = test[i]; sub(/-2-queues$/, "", one); t = target[j]; sub(/2$/, "1", t)
				printf "  %-30s two queues %s times one\n", "", ratio(m, median(iops[one " " t]))
			}
		}
	}
}
AWK
) "$out"
