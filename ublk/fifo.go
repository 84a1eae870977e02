package ublk

// requestFIFO is a list of requests, linked by Request.next.
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

// pop removes and returns the first request. The list must not be empty.
func (f *requestFIFO) pop() *Request {
	r := f.head
	f.head, r.next = r.next, nil
	return r
}
