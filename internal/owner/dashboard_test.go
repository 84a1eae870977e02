package owner

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/nbdclient"
)

// TestDashboard evaluates every query of the Grafana dashboard over two scrapes of an owner under load: none is empty,
// and the dashboard shows every metric of a store.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile("../../init/grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct{ Name, Definition string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	p := scrapesUnderLoad(t)
	queries := 0
	for _, panel := range dashboard.Panels {
		for _, q := range panel.Targets {
			queries++
			expr := strings.NewReplacer("$instance", ".*", "$volume", ".*", "$__rate_interval", "1m").Replace(q.Expr)
			v, err := p.eval(expr)
			if err != nil || len(v) == 0 {
				t.Errorf("%s: %s: %d series, %v", panel.Title, q.Expr, len(v), err)
			}
		}
	}
	for _, x := range dashboard.Templating.List {
		if name := strings.NewReplacer("label_values(", "", `{instance=~"$instance"}`, "").Replace(x.Definition); name != "" {
			name, label, _ := strings.Cut(strings.TrimSuffix(name, ")"), ", ")
			if s := p.last[name]; len(s) == 0 || s[0].labels[label] == "" {
				t.Errorf("the variable %s has no values: %s", x.Name, x.Definition)
			}
		}
	}
	for name := range p.last {
		if strings.HasPrefix(name, "vdisk_") && !strings.Contains(string(text), name+"{") && !shownOtherwise[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
	if queries < 40 {
		t.Errorf("%d queries", queries)
	}
}

// shownOtherwise are metrics that are there for other uses than a graph.
var shownOtherwise = map[string]bool{
	"vdisk_store_info": true, "vdisk_store_start_time_seconds": true, "vdisk_checkpoint_last_timestamp_seconds": true,
	"vdisk_scrub_last_timestamp_seconds": true, "vdisk_scrub_read_bytes": true, "vdisk_nbd_services": true,
}

// lint expects nothing of what 'promtool check metrics' finds, which is this linter.
func lint(t *testing.T, scrape string) {
	t.Helper()
	problems, err := promlint.New(strings.NewReader(scrape)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// scrapesUnderLoad returns two scrapes of an owner whose volume is used over NBD before each.
func scrapesUnderLoad(t *testing.T) (p promql) {
	o := offer(t, newStore(t))
	path, end := serving(t, o, ServeOptions{})
	defer func() {
		if err := end(); err != nil {
			t.Error(err)
		}
	}()
	c, err := nbdclient.Dial(path, "v")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	unit := bytes.Repeat([]byte("some text "), 16<<10/10+1)[:16<<10]
	load := func() map[string][]series {
		var errs []error
		for i := range int64(8) {
			_, err := c.WriteAt(unit, i*int64(len(unit)))
			errs = append(errs, err)
		}
		errs = append(errs, c.Trim(1<<20, 1<<20, 0), c.Zero(2<<20, 1<<20, 0), c.Sync(), o.store.Checkpoint())
		for range 2 {
			_, err = c.ReadAt(make([]byte, 4096), 4096)
			errs = append(errs, err)
		}
		var text bytes.Buffer
		if err := errors.Join(append(errs, o.Metrics(t.Context(), &text))...); err != nil {
			t.Fatal(err)
		}
		lint(t, text.String())
		families, err := metrics.Parse(&text)
		if err != nil {
			t.Fatal(err)
		}
		return scraped(families)
	}
	p.first = load()
	p.last = load()
	return p
}
