package metrics

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// sample is a reading with something of everything.
func sample() Reading {
	var s ublk.OpStats
	for _, d := range []time.Duration{4095, 4096, 5 * time.Microsecond, 3 * time.Millisecond, time.Hour} {
		s.Latency.Add(d)
	}
	s.Requests, s.Bytes, s.Errors = 5, 16384, 1
	t := Traffic{Ref: cow.Ref{Volume: "v", Snapshot: "mon"}}
	t.Ops[1] = OperationOf(&s)
	t.Errors[KindOf(fmt.Errorf("writing: %w", cow.ErrNoSpace))] = 1
	r := Reading{Version: "1.2", Store: "/a \"store\" of Zo\xeb", Started: time.Unix(1000, 5e8), Traffic: []Traffic{t}}
	r.Counters.Volumes = []cow.VolumeCounters{{Name: "v", Size: 1 << 30, WrittenBytes: 8192, CompressedBytes: 4096}}
	r.Counters.Syncs, r.Counters.SyncTime = 2, 3*time.Second
	r.Info.Scrub.Now = &cow.ScrubRun{Leaves: 1, Total: 4}
	return r
}

// TestWrite writes a reading, and expects some of its lines, the help text and type of each, and the conventions of
// Prometheus.
func TestWrite(t *testing.T) {
	var text bytes.Buffer
	if err := Write(&text, sample()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`vdisk_store_info{format="0",store="/a \"store\" of Zo�",uuid=""} 1`, "vdisk_store_start_time_seconds 1000.5", "vdisk_scrub_progress_ratio 0.25",
		"vdisk_log_sync_duration_seconds_sum 3", "vdisk_log_sync_duration_seconds_count 2", `vdisk_volume_size_bytes{volume="v"} 1.073741824e+09`,
		`vdisk_volume_operations_total{operation="write",snapshot="mon",volume="v"} 5`, `vdisk_volume_operations_total{operation="read",snapshot="mon",volume="v"} 0`,
		`vdisk_volume_bytes_total{operation="write",snapshot="mon",volume="v"} 16384`, `vdisk_volume_errors_total{kind="no-space",snapshot="mon",volume="v"} 1`,
		`vdisk_volume_operation_duration_seconds_bucket{operation="write",snapshot="mon",volume="v",le="4.096e-06"} 1`,
		`vdisk_volume_operation_duration_seconds_bucket{operation="write",snapshot="mon",volume="v",le="8.192e-06"} 3`,
		`vdisk_volume_operation_duration_seconds_bucket{operation="write",snapshot="mon",volume="v",le="0.004194304"} 4`,
		`vdisk_volume_operation_duration_seconds_bucket{operation="write",snapshot="mon",volume="v",le="17.179869184"} 4`,
		`vdisk_volume_operation_duration_seconds_bucket{operation="write",snapshot="mon",volume="v",le="+Inf"} 5`,
		"# TYPE vdisk_store_written_bytes_total counter", "go_goroutines ", "process_resident_memory_bytes ",
	} {
		if !strings.Contains("\n"+text.String(), "\n"+want) {
			t.Errorf("there is no line %s", want)
		}
	}
	if strings.Contains(text.String(), `duration_seconds_count{operation="read"`) {
		t.Error("there is a histogram of what has not happened")
	}
	problems, err := promlint.New(&text).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "vdisk_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// TestPedantic lets a registry check that what the collector sends is consistent.
func TestPedantic(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(collector{sample()})
	if _, err := registry.Gather(); err != nil {
		t.Error(err)
	}
}

// TestDocument holds docs/metrics.md to the metrics that there are.
func TestDocument(t *testing.T) {
	document, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	if err := Write(&text, sample()); err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(&text)
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]string{}
	for name, f := range families {
		if strings.HasPrefix(name, "vdisk_") {
			there[name] = strings.ToLower(f.GetType().String())
		}
	}
	described := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(vdisk_[a-z_]+)` \\| ([a-z]+) \\| .+ \\|$").FindAllStringSubmatch(string(document), -1) {
		described[row[1]] = row[2]
	}
	if !maps.Equal(there, described) {
		for _, name := range slices.Sorted(maps.Keys(there)) {
			if there[name] != described[name] {
				t.Errorf("%s is a %s, and the document says %q", name, there[name], described[name])
			}
		}
		for name := range described {
			if there[name] == "" {
				t.Errorf("there is no %s", name)
			}
		}
	}
	for _, kind := range Kinds {
		if !strings.Contains(string(document), "`"+kind+"`") {
			t.Errorf("the document does not name errors of kind %s", kind)
		}
	}
}

// TestKinds gives each error its kind, and the one that says more if there are two.
func TestKinds(t *testing.T) {
	for _, x := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("%w: %w", cow.ErrNoSpace, syscall.ENOSPC), "no-space"},
		{fmt.Errorf("%w: %w", cow.ErrFailed, syscall.EIO), "failed"},
		{cow.ErrCorrupt, "corrupt"},
		{cow.ErrReadOnly, "read-only"},
		{cow.ErrInvalid, "invalid"},
		{fmt.Errorf("reading: %w", syscall.EIO), "io"},
		{fmt.Errorf("panic"), "other"},
	} {
		if got := Kinds[KindOf(x.err)]; got != x.want {
			t.Errorf("%v is of the kind %s, not %s", x.err, got, x.want)
		}
	}
}

// TestOperation packs counters, and unpacks them; what another version sent does no harm.
func TestOperation(t *testing.T) {
	o := sample().Traffic[0].Ops[1]
	if s := o.Stats(); s.Requests != 5 || s.Bytes != 16384 || s.Errors != 1 || s.Latency.Count() != 5 || s.Latency.Sum != o.Time {
		t.Errorf("%+v became %d requests, %d of them in the histogram", o, s.Requests, s.Latency.Count())
	}
	o.Latency = append(o.Latency, [2]uint64{1 << 40, 1})
	if n := o.Stats().Latency.Count(); n != 5 {
		t.Errorf("%d requests", n)
	}
}
