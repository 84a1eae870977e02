package format

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestGUID holds the text of a GUID, and that of a row without one, to what other stores have already seen.
func TestGUID(t *testing.T) {
	for text, want := range map[string]GUID{"": {}, "01020000000000000000000000000003": {1, 2, 15: 3}} {
		var g GUID
		if err := g.UnmarshalText([]byte(text)); err != nil || g != want || g.String() != text || g.IsZero() != (text == "") {
			t.Error(text, g, err)
		}
	}
	for _, text := range []string{"0", "00", strings.Repeat("0", 32), strings.Repeat("A", 32), strings.Repeat("a", 31), strings.Repeat("a", 33), strings.Repeat("a", 34), strings.Repeat("g", 32)} {
		if err := new(GUID).UnmarshalText([]byte(text)); !errors.Is(err, ErrCorrupt) {
			t.Error(text, err)
		}
	}
	if g := testGUID.GUIDOf(testUUID); g != testGUID.GUID {
		t.Error(g)
	}
	row := testSnap
	if g := row.GUIDOf(testUUID); g.String() != "b343da2be50b6541fcee840c577e8d67" {
		t.Error(g)
	}
	row.Name, row.Volume = "renamed", 0
	if row.GUIDOf(testUUID) != testSnap.GUIDOf(testUUID) {
		t.Error("a name has changed it")
	}
	seen := map[GUID]bool{testSnap.GUIDOf(testUUID): true}
	for _, change := range []func(){
		func() { row.Branch++ }, func() { row.Epoch++ }, func() { row.ID++ }, func() { row.Created = row.Created.Add(1) },
	} {
		change()
		seen[row.GUIDOf(testUUID)] = true
	}
	if seen[row.GUIDOf([16]byte{1})] = true; len(seen) != 6 {
		t.Error(seen)
	}
}

func TestCheckProperties(t *testing.T) {
	many := map[string]string{}
	for i := range MaxProperties {
		many[fmt.Sprintf("%02d:a.b_c-D", i)] = strings.Repeat("é", (MaxPropertyBytes/MaxProperties-len("00:a.b_c-D"))/2)
	}
	large := map[string]string{"k": strings.Repeat("v", MaxPropertyValue)}
	for len(large) < MaxPropertyBytes/MaxPropertyValue {
		large[fmt.Sprint(len(large))] = large["k"]
	}
	if err := errors.Join(CheckProperties(nil), CheckProperties(many)); err != nil {
		t.Error(err)
	}
	many["one-more"] = ""
	for _, m := range []map[string]string{
		many, large, {"": "x"}, {":x": "x"}, {"a=b": "x"}, {strings.Repeat("k", 64): "x"}, {"k": strings.Repeat("v", MaxPropertyValue+1)}, {"k": "a\nb"}, {"k": "a\x7f"}, {"k": "\xff"},
	} {
		if err := CheckProperties(m); !errors.Is(err, ErrName) {
			t.Error(len(m), err)
		}
	}
}

func TestCheckHolds(t *testing.T) {
	many := map[string]time.Time{}
	for i := range MaxHolds {
		many[fmt.Sprint("tag-", i)] = testTime
	}
	if err := errors.Join(CheckHolds(nil), CheckHolds(many)); err != nil {
		t.Error(err)
	}
	many["one-more"] = testTime
	for _, m := range []map[string]time.Time{many, {"": testTime}, {"a b": testTime}, {"a:b": testTime}, {strings.Repeat("k", 64): testTime}} {
		if err := CheckHolds(m); !errors.Is(err, ErrName) {
			t.Error(len(m), err)
		}
		for _, volume := range []uint32{0, 1} {
			row := testHeld
			row.Volume, row.Holds = volume, m
			if _, err := AppendRow(nil, row); !errors.Is(err, ErrName) {
				t.Error(len(m), err)
			}
		}
	}
}

// TestReceivingRows refuses what a reception never is.
func TestReceivingRows(t *testing.T) {
	if _, err := AppendRow(nil, testReceiving); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Receiving){
		"no guid":        func(r *Receiving) { r.GUID = GUID{} },
		"its own base":   func(r *Receiving) { r.Base = r.GUID },
		"no volume":      func(r *Receiving) { r.Volume = "" },
		"no snapshot":    func(r *Receiving) { r.Snapshot = "a@b" },
		"no size":        func(r *Receiving) { r.Size = 0 },
		"behind the end": func(r *Receiving) { r.Block = blocksOf(r.Size) + 1 },
	} {
		v, bad := testReceiving, *testReceiving.Receiving
		spoil(&bad)
		v.Receiving = &bad
		if _, err := AppendRow(nil, v); err == nil {
			t.Error(name)
		}
	}
}

// TestStreamWithNewNames: a program that does not know the names of snapshots in a stream learns that from its features.
func TestStreamWithNewNames(t *testing.T) {
	h := StreamHeader{Features: []string{FeatureZstd}, Volume: "v", GUID: GUID{1}, Size: 1 << 20, LogicalBlock: 512, Codec: S2, Created: testTime}
	for names, want := range map[[2]string][]string{
		{"a", ""}: {FeatureZstd}, {"12:00", ""}: {FeatureZstd, FeatureNames}, {"a", "v@1+1"}: {FeatureZstd, FeatureNames},
	} {
		h := h
		if h.Snapshot, h.BaseName = names[0], names[1]; h.BaseName != "" {
			h.Base = GUID{2}
		}
		text, err := AppendStreamHeader(nil, &h)
		must(t, err)
		got, err := DecodeStreamHeader(text)
		if must(t, err); !slices.Equal(got.Features, want) {
			t.Errorf("%q: %q, want %q", names, got.Features, want)
		}
		text = bytes.Replace(text, []byte(`,"names"`), nil, 1)
		if _, err := DecodeStreamHeader(text); (err == nil) != (len(want) == 1) || err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("%q without the feature: %v", names, err)
		}
	}
	h.Volume, h.Snapshot = "v:w", "a"
	if _, err := AppendStreamHeader(nil, &h); !errors.Is(err, ErrName) {
		t.Errorf("a volume %s: %v", h.Volume, err)
	}
}
