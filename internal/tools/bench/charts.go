package main

import "fmt"

// charts are all plots of the report.
func charts(nbd, guest run) []chart {
	peers := []string{"vdisk", "qcow2", "raw", "nbdkit"}
	cow := peers[:2]
	rate := func(x result) float64 { return x.Rate }
	mib := func(x result) float64 { return x.MiB }
	space := func(x result) float64 { return x.Space }
	all := []chart{
		{name: "ratios", width: 900, height: 620, panels: []panel{nbd.ratios(comparable, peers)}},
		{name: "depth", width: 900, height: 420, columns: 2, panels: []panel{
			nbd.byDepth("Random reads of 4 KiB, warm", "randread", peers),
			nbd.byDepth("Random writes of 4 KiB", "randwrite", peers),
		}},
		{name: "snapshot", width: 900, height: 400, columns: 2, panels: []panel{
			nbd.bars("Random writes of 4 KiB", "requests/s", []string{"before-write", "after-write", "child-write"},
				[]string{"before", `after a\nsnapshot`, `in a clone\nor overlay`}, cow, rate),
			nbd.bars("Random reads of 4 KiB", "requests/s", []string{"before-read", "after-read", "child-read"},
				[]string{"before", `after a\nsnapshot`, `in a clone\nor overlay`}, cow, rate),
		}},
		{name: "chain", width: 900, height: 380, panels: []panel{
			nbd.bars("Random reads of 4 KiB", "requests/s", []string{"chain-none", "chain-snapshots", "chain-clones"},
				[]string{
					"no snapshot", fmt.Sprintf(`below %d\nsnapshots`, nbd.Machine.Parameters.Snapshots),
					fmt.Sprintf(`end of a chain of\n%d clones or overlays`, nbd.Machine.Parameters.Clones),
				}, cow, rate),
		}},
		{name: "fill", width: 900, height: 400, panels: []panel{
			nbd.bars("Requests of 1 MiB, in order", "MiB/s", []string{"fill", "read-cold", "read-overwritten", "read-packed"},
				[]string{`fill an\nempty disk`, `read it,\ncold`, `read it overwritten\nby 4 KiB, cold`, `the same after\ngc --cold`}, peers, mib),
		}},
		{name: "mixed", width: 900, height: 420, columns: 2, panels: []panel{
			nbd.bars("Reads and writes together", "requests/s", []string{"database", "machine", "half"},
				[]string{"database", "machine", "half and half"}, peers, rate),
			nbd.bars("Random writes of 4 KiB, a flush after each", "requests/s", []string{"fsync"}, []string{"depth 1"}, peers, rate),
		}},
		{name: "latency", width: 900, height: 760, columns: 2, panels: []panel{
			nbd.latencies("Random reads of 4 KiB, warm, depth 1", "randread-1", "reads", peers),
			nbd.latencies("Random reads of 4 KiB, warm, depth 32", "randread-32", "reads", peers),
			nbd.latencies("Random writes of 4 KiB, depth 32", "randwrite-32", "writes", peers),
			nbd.latencies("Flushes, one after each write of 4 KiB", "fsync", "flushes", peers),
		}},
		{name: "space", width: 900, height: 420, columns: 2, panels: []panel{
			nbd.bars("Space on the disk", "bytes for a byte of data", []string{"space-filled", "space-overwritten", "space-packed"},
				[]string{"filled", "overwritten", `after\ngc --cold`}, peers, space),
			nbd.bars("Space of random writes after a snapshot", "bytes for a byte written", []string{"space-after-snapshot"},
				[]string{"writes of 4 KiB"}, cow, space),
		}},
		{name: "full", width: 900, height: 380, panels: []panel{full(nbd)}},
	}
	if len(guest.Results) > 0 {
		all = append(all, chart{name: "guest", width: 900, height: 760, panels: []panel{
			guest.bars("Block devices in a guest: 4 KiB at random", "requests/s", []string{"2-randread-4k", "3-randwrite-4k", "4-randwrite-4k-after-snapshot"},
				[]string{"read", "write", `write after\na snapshot`}, guest.peers(guestTests), rate),
			guest.bars("Block devices in a guest: 1 MiB in order", "requests/s", guestTests[:1], []string{"fill"}, guest.peers(guestTests), rate),
		}})
	}
	return all
}

func full(r run) panel {
	p := panel{
		title: "vdisk: random writes of 4 KiB to a limited store", x: "what the volume takes of the store, when all of it is written",
		y: "requests/s", kind: "bars",
	}
	for _, percent := range fills {
		p.groups = append(p.groups, fmt.Sprintf("%d %%", percent))
	}
	for _, s := range []struct{ name, test, style string }{
		{"first", "full-first", "pale"}, {"steady", "full-steady", "vdisk"},
	} {
		x := series{name: s.name, style: styles[s.style]}
		for _, percent := range fills {
			x.figures = append(x.figures, r.rate(fmt.Sprintf("%s-%d", s.test, percent), "vdisk"))
		}
		p.series = append(p.series, x)
	}
	return p
}
