package format

import (
	"reflect"
	"testing"
	"time"
)

// usualRows have a usual text.
var usualRows = []any{
	&Volume{ID: 1, Name: "v", Size: 1 << 40, Codec: Zstd, Level: 19, LogicalBlock: 4096, Branch: 4294967294, Created: time.Date(2026, 11, 30, 1, 2, 3, 4e6, time.UTC)},
	&Volume{ID: 4294967295, Name: "a.b_c-D", Size: 512, LogicalBlock: 512, Branch: 1, Created: time.Date(2026, 11, 30, 1, 2, 3, 0, time.UTC)},
	&Snapshot{ID: 7, Volume: 3, Name: "2026-11-30T01:02:03+01:00", Branch: 2, Epoch: 10, Size: 4096, Created: time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC), GUID: GUID{1, 2, 3}},
	&Snapshot{ID: 8, Name: "deleted", Branch: 2, Epoch: 11, Size: 4096, GUID: GUID{15: 255}},
	&Branch{ID: 2, Epoch: 1},
	&Branch{ID: 3, Epoch: 4294967295, OriginBranch: 2, OriginEpoch: 100},
}

// TestUsualRows holds rows to be read without encoding/json, and all that differs from their text to be left to it.
func TestUsualRows(t *testing.T) {
	for _, row := range usualRows {
		b, err := AppendRow(nil, row)
		must(t, err)
		text := b[4:]
		fresh := func() usual { return reflect.New(reflect.TypeOf(row).Elem()).Interface().(usual) }
		got := fresh()
		if !got.readUsual(text) || !reflect.DeepEqual(got, row) {
			t.Errorf("%s is read as %+v", text, got)
		}
		for i := range text {
			if fresh().readUsual(text[:i]) {
				t.Errorf("%s is taken for a row", text[:i])
			}
		}
		if fresh().readUsual(append(text, ' ')) {
			t.Errorf("%s with something behind it is taken for a row", text)
		}
	}
	for _, text := range []string{
		`{"id":01,"epoch":1,"origin_branch":0,"origin_epoch":0}`,
		`{"id":,"epoch":1,"origin_branch":0,"origin_epoch":0}`,
		`{"id":-1,"epoch":1,"origin_branch":0,"origin_epoch":0}`,
		`{"id":4294967296,"epoch":1,"origin_branch":0,"origin_epoch":0}`,
		`{"id":99999999999999999999999,"epoch":1,"origin_branch":0,"origin_epoch":0}`,
		`{"epoch":1,"id":2,"origin_branch":0,"origin_epoch":0}`,
		`{"id":2, "epoch":1,"origin_branch":0,"origin_epoch":0}`,
		`{"id":2,"epoch":1}`,
	} {
		if new(Branch).readUsual([]byte(text)) {
			t.Errorf("%s is taken for the usual text of a branch", text)
		}
	}
	for _, name := range []string{`\u0061`, "ä", "a\x00", `a\"`} {
		text := `{"id":7,"volume":3,"name":"` + name + `","branch":2,"epoch":10,"size":4096,"created":"1970-01-01T00:00:00Z","guid":"01020300000000000000000000000000"}`
		if new(Snapshot).readUsual([]byte(text)) {
			t.Errorf("%s is taken for the usual text of a snapshot", text)
		}
	}
}

func BenchmarkDecodeRow(b *testing.B) {
	row, err := AppendRow(nil, usualRows[2])
	must(b, err)
	b.ReportAllocs()
	var s Snapshot
	for b.Loop() {
		must(b, DecodeRow(row, &s))
	}
}
