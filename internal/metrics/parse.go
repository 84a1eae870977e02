package metrics

import (
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Family is all metrics of one name.
type Family struct {
	Name    string   `json:"name"`
	Type    string   `json:"type"`
	Help    string   `json:"help"`
	Samples []Sample `json:"samples"`
}

// Sample is one number. Its name is the family's, with the endings of Prometheus's text format for the parts of a
// histogram or summary.
type Sample struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
	Value  float64           `json:"value"`
}

// Parse reads what Write has written. Numbers that are not finite are left out.
func Parse(text io.Reader) ([]Family, error) {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	found, err := parser.TextToMetricFamilies(text)
	if err != nil {
		return nil, err
	}
	list := make([]Family, 0, len(found))
	for _, name := range slices.Sorted(maps.Keys(found)) {
		f := found[name]
		out := Family{Name: name, Type: strings.ToLower(f.GetType().String()), Help: f.GetHelp(), Samples: []Sample{}}
		for _, m := range f.GetMetric() {
			out.add(m)
		}
		list = append(list, out)
	}
	return list, nil
}

// add adds the samples of a metric.
func (f *Family) add(m *dto.Metric) {
	labels := map[string]string{}
	for _, l := range m.GetLabel() {
		labels[l.GetName()] = l.GetValue()
	}
	put := func(ending string, v float64, more ...string) {
		if math.IsInf(v, 0) || math.IsNaN(v) {
			return
		}
		s := Sample{f.Name + ending, maps.Clone(labels), v}
		if len(more) == 2 {
			s.Labels[more[0]] = more[1]
		}
		f.Samples = append(f.Samples, s)
	}
	number := func(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
	switch {
	case m.Histogram != nil:
		for _, b := range m.Histogram.GetBucket() {
			put("_bucket", float64(b.GetCumulativeCount()), "le", number(b.GetUpperBound()))
		}
		put("_sum", m.Histogram.GetSampleSum())
		put("_count", float64(m.Histogram.GetSampleCount()))
	case m.Summary != nil:
		for _, q := range m.Summary.GetQuantile() {
			put("", q.GetValue(), "quantile", number(q.GetQuantile()))
		}
		put("_sum", m.Summary.GetSampleSum())
		put("_count", float64(m.Summary.GetSampleCount()))
	case m.Counter != nil:
		put("", m.Counter.GetValue())
	case m.Gauge != nil:
		put("", m.Gauge.GetValue())
	default:
		put("", m.Untyped.GetValue())
	}
}
