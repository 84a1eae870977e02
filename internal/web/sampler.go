package web

import (
	"cmp"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/metrics"
)

const (
	sampleEvery = 2 * time.Second
	// sampleLinger is how long sampling goes on after the last request for samples.
	sampleLinger = 10 * time.Second
	// maxSamples is how many samples are kept: a quarter of an hour.
	maxSamples = 450
	// shownBusy is how many of the busiest volumes and snapshots are told.
	shownBusy = 12
)

// sampler takes a sample of what the store does every sampleEvery, as long as somebody asks for them.
type sampler struct {
	run int64 // tells the samples of this process from those of another

	mu      sync.Mutex // guards the fields below
	on      bool       // the goroutine runs
	asked   time.Time  // for the last time
	before  *metrics.Reading
	samples []sample
	next    uint64
	busy    []busyVolume
	state   state
}

// sample is what a store did in an interval. page.js reads it.
type sample struct {
	N    uint64 `json:"n"`
	Time int64  `json:"t"` // the end of the interval, in milliseconds of Unix time
	rates
	Fill  *float64 `json:"fill"`  // in percent of where new data is refused; null: not known
	Files *float64 `json:"files"` // of the log, dead data with them, in percent of the room for them
}

// rates are metrics.Rates. Latencies are in microseconds, and 0 without requests.
type rates struct {
	Reads      float64 `json:"r"`
	Writes     float64 `json:"w"`
	Flushes    float64 `json:"f"`
	Errors     float64 `json:"e"`
	ReadBytes  float64 `json:"rb"`
	WriteBytes float64 `json:"wb"`
	ReadP50    float64 `json:"r50"`
	ReadP99    float64 `json:"r99"`
	WriteP50   float64 `json:"w50"`
	WriteP99   float64 `json:"w99"`
}

// busyVolume is what a volume or snapshot did in the last interval.
type busyVolume struct {
	Name string `json:"name"`
	rates
}

// state is what is shown beside the graphs, as of the last sample.
type state struct {
	Clients int    `json:"clients"`
	Devices int    `json:"devices"`
	Cleaner string `json:"cleaner"`
}

// answer is the answer to a request for samples.
type answer struct {
	Run     int64        `json:"run"`
	Every   int64        `json:"every"` // in milliseconds
	Samples []sample     `json:"samples"`
	Busy    []busyVolume `json:"busy"`
	State   state        `json:"state"`
}

// live answers GET /live?after=N with the samples behind the one of that number.
func (s *server) live(w http.ResponseWriter, r *http.Request) {
	after, err := strconv.ParseUint(cmp.Or(r.FormValue("after"), "0"), 10, 64)
	if err != nil {
		http.Error(w, "after has to be the number of a sample", http.StatusBadRequest)
		return
	}
	a := s.samplesAfter(after)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a) // fails if the client is gone
}

// samplesAfter returns the samples behind number after, and lets sampling begin or go on.
func (s *server) samplesAfter(after uint64) answer {
	x := &s.sampler
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.asked = s.now(); !x.on {
		x.on = true
		s.work.Go(s.sample)
	}
	first, _ := slices.BinarySearchFunc(x.samples, after, func(a sample, n uint64) int {
		if a.N <= n {
			return -1
		}
		return 1
	})
	return answer{x.run, sampleEvery.Milliseconds(), append([]sample{}, x.samples[first:]...), append([]busyVolume{}, x.busy...), x.state}
}

// sample samples until nobody has asked for a while.
func (s *server) sample() {
	ticks, stop := s.tick(sampleEvery)
	defer stop()
	for {
		if from, err := s.source(); err == nil {
			s.sampler.take(from.Activity())
		}
		select {
		case <-ticks:
		case <-s.life.Done():
			return
		}
		if s.sampler.tired(s.now()) {
			return
		}
	}
}

// tired reports whether nobody has asked for a while. Then the caller must stop.
func (x *sampler) tired(now time.Time) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if now.Sub(x.asked) < sampleLinger {
		return false
	}
	x.on, x.before, x.busy = false, nil, nil
	return true
}

// take makes a sample of what has happened since the reading before. The first reading makes none.
func (x *sampler) take(now metrics.Reading) {
	x.mu.Lock()
	defer x.mu.Unlock()
	before := x.before
	x.before = &now
	x.state = state{Clients: now.Clients, Devices: now.Served + now.Waiting, Cleaner: cleanerState(&now)}
	if before == nil || !now.At.After(before.At) {
		return
	}
	seconds := now.At.Sub(before.At).Seconds()
	past := map[cow.Ref]*metrics.Traffic{}
	for i := range before.Traffic {
		past[before.Traffic[i].Ref] = &before.Traffic[i]
	}
	var all metrics.Growth
	x.busy = nil
	for i := range now.Traffic {
		t := &now.Traffic[i]
		was := cmp.Or(past[t.Ref], new(metrics.Traffic))
		var one metrics.Growth
		one.Add(t, was)
		all.Add(t, was)
		if r := ratesOf(one.Rates(seconds)); r.Reads+r.Writes+r.Flushes > 0 {
			x.busy = append(x.busy, busyVolume{t.Ref.String(), r})
		}
	}
	slices.SortStableFunc(x.busy, func(a, b busyVolume) int {
		return cmp.Compare(b.Reads+b.Writes+b.Flushes, a.Reads+a.Writes+a.Flushes)
	})
	x.busy = x.busy[:min(len(x.busy), shownBusy)]
	x.next++
	if len(x.samples) >= maxSamples {
		x.samples = slices.Delete(x.samples, 0, len(x.samples)-maxSamples+1)
	}
	x.samples = append(x.samples, sample{x.next, now.At.UnixMilli(), ratesOf(all.Rates(seconds)), fillPercent(&now), filesPercent(&now)})
}

func ratesOf(r metrics.Rates) rates {
	us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	return rates{
		Reads: r.Reads, Writes: r.Writes, Flushes: r.Flushes, Errors: r.Errors, ReadBytes: r.ReadBytes, WriteBytes: r.WriteBytes,
		ReadP50: us(r.ReadP50), ReadP99: us(r.ReadP99), WriteP50: us(r.WriteP50), WriteP99: us(r.WriteP99),
	}
}

// fillPercent returns how full the store is, as vdisk info has it; nil: that is not known.
func fillPercent(r *metrics.Reading) *float64 {
	f := r.Info.Fill
	if f == nil || f.FullAt <= 0 {
		return nil
	}
	p := min(100, 100*float64(f.Bytes)/float64(f.FullAt))
	return &p
}

// filesPercent returns how much of the room for the log its files take, as vdisk top has it.
func filesPercent(r *metrics.Reading) *float64 {
	all := r.Counters.FileBytes + r.Counters.RoomBytes
	if all <= 0 {
		return nil
	}
	p := 100 * float64(r.Counters.FileBytes) / float64(all)
	return &p
}

func cleanerState(r *metrics.Reading) string {
	switch {
	case r.Counters.Paced:
		return "writers wait for it"
	case r.Counters.Cleaning:
		return "at work"
	}
	return "idle"
}
