package ublk

// requestFIFO is a list of requests, linked by next.
type requestFIFO struct{ head, tail *Request }

func (f *requestFIFO) empty() bool { return f.head == nil }

func (f *requestFIFO) push(r *Request) {
	r.next = nil
	if f.head == nil {
		f.head = r
	} else {
		f.tail.next = r
	}
	f.tail = r
}

func (f *requestFIFO) pop() {
	r := f.head
	f.head, r.next = r.next, nil
}
