package web

import (
	"bytes"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/owner"
)

// pageTemplate escapes all text for the place where it stands.
var pageTemplate = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"size":    byteSize,
	"usize":   func(n uint64) string { return byteSize(int64(n)) },
	"percent": func(p *float64) string { return fmt.Sprintf("%.1f", *p) },
	"clock":   func(t time.Time) string { return t.Local().Format(time.DateTime) },
	"machine": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"count": func(n int, one, many string) string {
		if n == 1 {
			return "1 " + one
		}
		return fmt.Sprintf("%d %s", n, many)
	},
}).ParseFS(assets, "assets/page.html"))

const (
	// volumesWait is how long a request waits for what takes longer as the store has more volumes or chunks. Twice that must
	// be less than a client waits for the answer.
	volumesWait = 10 * time.Second
	// usageWait is how long it waits for what takes longer as there is more data. Then the page does without.
	usageWait = time.Second
	maxFind   = 200 // bytes of what is looked for
)

// pageData is all that the template shows.
type pageData struct {
	Now     time.Time
	Reading metrics.Reading
	Open    bool // the store is open
	Cleaner string
	Devices int
	Fill    *float64
	Full    string // the class of the fill: warn or bad, from levels on
	Ratio   string

	Find        string
	Tree        tree
	TreeErr     string
	UsageAt     time.Time
	UsageErr    string
	Measuring   bool // what volumes take is being measured, for the first time
	Map         *chunkMap
	MapErr      string
	Kinds       []kindCount
	Events      []event
	EventsErr   string
	ShownEvents int
}

// kindCount is a kind of chunks, and how many there are.
type kindCount struct {
	Kind  cow.ChunkKind
	Count int
	Text  string
}

// kindTexts say what the kinds of chunks mean.
var kindTexts = map[cow.ChunkKind]string{
	cow.ChunkDamaged: "a record does not verify", cow.ChunkCleaning: "live data is being moved out", cow.ChunkOpen: "being written",
	cow.ChunkFull: "written", cow.ChunkDead: "nothing is live: soon removed",
}

// unread is what the page says of a part that cannot be read. The log has more.
const unread = "This cannot be read at present; the log of vdisk says why."

// why returns what the page says in place of a part that was read at a time, or is still being read for the first time.
func why(at time.Time, err error) string {
	switch {
	case err != nil:
		return unread
	case at.IsZero():
		return "This is still being read."
	}
	return ""
}

// page answers GET /?find=TEXT.
func (s *server) page(w http.ResponseWriter, r *http.Request) {
	find := r.FormValue("find")
	if len(find) > maxFind || !utf8.ValidString(find) {
		http.Error(w, "that text is no part of a name", http.StatusBadRequest)
		return
	}
	d := pageData{Now: s.now(), Find: find, ShownEvents: shownEvents, Ratio: "–"}
	if from, err := s.source(); err == nil {
		d.Open, d.Reading = true, from.Activity()
		d.head()
	}
	s.addTree(r, &d)
	s.addMap(r, &d)
	var err error
	if d.Events, err = s.events.newest(s.Journal); err != nil {
		if s.events.tell(d.Now) {
			s.Log.Warn("a part of the page cannot be read", "part", "events", "err", err)
		}
		d.EventsErr = unread
	}
	var text bytes.Buffer
	if err := pageTemplate.Execute(&text, &d); err != nil {
		s.Log.Error("the page cannot be made", "err", err)
		http.Error(w, "the page cannot be made; the log of vdisk says why", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = text.WriteTo(w) // fails if the client is gone
}

// head makes what the top of the page shows of a reading.
func (d *pageData) head() {
	d.Cleaner, d.Devices = cleanerState(&d.Reading), d.Reading.Served+d.Reading.Waiting
	if d.Fill = fillPercent(&d.Reading); d.Fill != nil {
		for i, level := range d.Reading.Info.FillLevels {
			if *d.Fill >= float64(level) {
				d.Full = [...]string{"warn", "bad"}[min(i, 1)]
			}
		}
	}
	if c := d.Reading.Counters; c.CompressedBytes > 0 {
		d.Ratio = fmt.Sprintf("%.2f", float64(c.WrittenBytes)/float64(c.CompressedBytes))
	}
}

func (s *server) addTree(r *http.Request, d *pageData) {
	volumes, at, err := s.volumes.get(r.Context(), volumesWait)
	if d.TreeErr = why(at, err); d.TreeErr != "" {
		return
	}
	d.Tree = s.treeOf(volumes, d.Find)
	usage, at, err := s.usage.get(r.Context(), s.usageWait)
	switch {
	case errors.Is(err, cow.ErrCorrupt):
		d.UsageErr = "What they take is not known, since the map is damaged: 'vdisk check' names the damage."
	case err != nil:
		d.UsageErr = "What they take cannot be read at present; the log of vdisk says why."
	}
	d.UsageAt, d.Measuring = at, at.IsZero() && err == nil
	d.Tree.addUsage(usage)
}

// treeOf makes one tree at a time: of a large store it takes memory and time, and every user of the machine may ask for it.
func (s *server) treeOf(volumes []owner.Volume, find string) tree {
	s.making.Lock()
	defer s.making.Unlock()
	return treeOf(volumes, find)
}

func (s *server) addMap(r *http.Request, d *pageData) {
	m, at, err := s.chunks.get(r.Context(), volumesWait)
	if d.MapErr = why(at, err); d.MapErr != "" {
		return
	}
	d.Map = m
	for _, k := range kinds {
		d.Kinds = append(d.Kinds, kindCount{k, m.Counts[k], kindTexts[k]})
	}
}
