package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	// No more openers warm up than that: it is for the processes, not for the streams.
	warmupOpeners = 64
	pollPause     = 100 * time.Microsecond
	countTimeout  = 60 * time.Second
)

var workloads = map[string]func(*yamux.Session, *command) (*answer, error){
	"bulk":         bulk,
	"echo_latency": echoLatency,
	"echo_rate":    echoRate,
	"churn":        churn,
	"idle":         idle,
	"mixed":        mixed,
	"paced_bulk":   pacedBulk,
}

func bulk(session *yamux.Session, c *command) (*answer, error) {
	if c.Warmup > 0 {
		if _, err := sendBulk(session, c, c.Warmup); err != nil {
			return nil, err
		}
	}
	return sendBulk(session, c, c.Bytes)
}

func sendBulk(session *yamux.Session, c *command, total int) (*answer, error) {
	streams, err := openAll(session, c.Streams, kindSink)
	if err != nil {
		return nil, err
	}
	piece := make([]byte, c.Write)
	writes := total / c.Streams / c.Write
	if writes == 0 {
		writes = 1
	}
	start := time.Now()
	err = together(c.Streams, func(i int) error {
		for n := 0; n < writes; n++ {
			if _, err := streams[i].Write(piece); err != nil {
				return err
			}
		}
		return finishSink(session, streams[i], writes*c.Write)
	})
	elapsed := time.Since(start)
	writes *= c.Streams
	return &answer{Seconds: elapsed.Seconds(), Operations: writes, Bytes: writes * c.Write}, err
}

func echoLatency(session *yamux.Session, c *command) (*answer, error) {
	streams, err := openAll(session, 1, kindEcho)
	if err != nil {
		return nil, err
	}
	defer streams[0].Close()
	m := newMessage(c.Size)
	if err := m.trips(streams[0], c.Warmup); err != nil {
		return nil, err
	}
	times := make([]time.Duration, c.Count)
	start := time.Now()
	for i := range times {
		if times[i], err = m.timedTrip(streams[0]); err != nil {
			return nil, err
		}
	}
	return &answer{Seconds: time.Since(start).Seconds(), Operations: c.Count, Latencies: summary(times)}, nil
}

func echoRate(session *yamux.Session, c *command) (*answer, error) {
	streams, err := openAll(session, c.Streams, kindEcho)
	if err != nil {
		return nil, err
	}
	messages := make([]*message, c.Streams)
	err = together(c.Streams, func(i int) error {
		messages[i] = newMessage(c.Size)
		return messages[i].trips(streams[i], 1)
	})
	if err != nil {
		return nil, err
	}
	start := time.Now()
	err = together(c.Streams, func(i int) error { return messages[i].trips(streams[i], c.Count) })
	return &answer{Seconds: time.Since(start).Seconds(), Operations: c.Streams * c.Count}, err
}

func churn(session *yamux.Session, c *command) (*answer, error) {
	warming := c.Openers
	if warming > warmupOpeners {
		warming = warmupOpeners
	}
	if err := callAll(session, warming, c.Warmup, c.Size); err != nil {
		return nil, err
	}
	start := time.Now()
	err := callAll(session, c.Openers, c.Count, c.Size)
	return &answer{Seconds: time.Since(start).Seconds(), Operations: c.Count}, err
}

func callAll(session *yamux.Session, openers, count, size int) error {
	left := int64(count)
	return together(openers, func(int) error {
		m := newMessage(size)
		for atomic.AddInt64(&left, -1) >= 0 {
			if err := m.call(session); err != nil {
				return err
			}
		}
		return nil
	})
}

// idle ends with an echo, whose stream is accepted after all the others.
func idle(session *yamux.Session, c *command) (*answer, error) {
	kind := byte(kindHeld)
	if c.Reader {
		kind = kindIdle
	}
	// The session keeps them.
	if _, err := openAll(session, c.Streams, kind); err != nil {
		return nil, err
	}
	if err := newMessage(1).call(session); err != nil {
		return nil, err
	}
	rss, err := residentBytes()
	return &answer{Operations: c.Streams, RSS: rss}, err
}

func mixed(session *yamux.Session, c *command) (*answer, error) {
	echoes, err := openAll(session, 1, kindEcho)
	if err != nil {
		return nil, err
	}
	sinks, err := openAll(session, 1, kindSink)
	if err != nil {
		return nil, err
	}
	m := newMessage(c.Size)
	if err := m.trips(echoes[0], c.Warmup); err != nil {
		return nil, err
	}
	piece, sent, elapsed := make([]byte, c.Write), 0, time.Duration(0)
	times := make([]time.Duration, 0, 1<<16)
	start := time.Now()
	end := start.Add(seconds(c.Seconds))
	pour := func() error {
		for ; time.Now().Before(end); sent += len(piece) {
			if _, err := sinks[0].Write(piece); err != nil {
				return err
			}
		}
		err := finishSink(session, sinks[0], sent)
		elapsed = time.Since(start)
		return err
	}
	ping := func() error {
		for time.Now().Before(end) {
			took, err := m.timedTrip(echoes[0])
			if err != nil {
				return err
			}
			times = append(times, took)
		}
		return nil
	}
	both := []func() error{pour, ping}
	err = together(len(both), func(i int) error { return both[i]() })
	return &answer{Seconds: elapsed.Seconds(), Operations: len(times), Bytes: sent, Latencies: summary(times)}, err
}

// pacedBulk asks for more than can come while it counts; the end of the session stops the source.
func pacedBulk(session *yamux.Session, c *command) (*answer, error) {
	start := time.Now()
	stream, err := session.OpenStream()
	if err != nil {
		return nil, err
	}
	if _, err := stream.Write(binary.BigEndian.AppendUint64([]byte{kindSource}, math.MaxInt64)); err != nil {
		return nil, err
	}
	buffer, received := make([]byte, bulkPiece), 0
	began, now := start, start
	countedFrom, end := start.Add(seconds(c.Skip)), start.Add(seconds(c.Seconds))
	for now.Before(end) {
		n, err := stream.Read(buffer)
		if err != nil {
			return nil, err
		}
		if now = time.Now(); now.Before(countedFrom) {
			began = now
		} else {
			received += n
		}
	}
	return &answer{Seconds: now.Sub(began).Seconds(), Operations: 1, Bytes: received}, nil
}

func openAll(session *yamux.Session, count int, kind byte) ([]*yamux.Stream, error) {
	streams, first := make([]*yamux.Stream, count), []byte{kind}
	for i := range streams {
		stream, err := session.OpenStream()
		if err != nil {
			return nil, err
		}
		if _, err := stream.Write(first); err != nil {
			return nil, err
		}
		streams[i] = stream
	}
	return streams, nil
}

// message is what one client sends to be echoed, and the buffer for what comes back.
type message struct {
	first []byte // the kind of a new stream and the payload
	reply []byte
}

func newMessage(size int) *message {
	first := make([]byte, 1+size)
	first[0] = kindEcho
	return &message{first, make([]byte, size)}
}

func (m *message) trip(stream *yamux.Stream) error {
	if _, err := stream.Write(m.first[1:]); err != nil {
		return err
	}
	_, err := io.ReadFull(stream, m.reply)
	return err
}

func (m *message) trips(stream *yamux.Stream, count int) error {
	for n := 0; n < count; n++ {
		if err := m.trip(stream); err != nil {
			return err
		}
	}
	return nil
}

func (m *message) timedTrip(stream *yamux.Stream) (time.Duration, error) {
	start := time.Now()
	err := m.trip(stream)
	return time.Since(start), err
}

// call makes a trip on a stream of its own.
func (m *message) call(session *yamux.Session) error {
	stream, err := session.OpenStream()
	if err != nil {
		return err
	}
	if _, err := stream.Write(m.first); err != nil {
		return err
	}
	if _, err := io.ReadFull(stream, m.reply); err != nil {
		return err
	}
	return stream.Close()
}

// finishSink half-closes and compares the counts. After its own Close the library of 2019 answers a read with end of
// file as long as nothing has come, and has no other way to wait: hence the pauses, which cost a millisecond at most.
func finishSink(session *yamux.Session, stream *yamux.Stream, sent int) error {
	if err := stream.Close(); err != nil {
		return err
	}
	count := make([]byte, countSize)
	for held, since := 0, time.Now(); held < countSize; {
		n, err := stream.Read(count[held:])
		held += n
		if err == io.EOF && !session.IsClosed() && time.Since(since) < countTimeout {
			time.Sleep(pollPause)
		} else if err != nil {
			return err
		}
	}
	if arrived := binary.BigEndian.Uint64(count); arrived != uint64(sent) {
		return fmt.Errorf("%d bytes were sent and %d have arrived", sent, arrived)
	}
	return nil
}

// together runs the tasks, each in a goroutine of its own, and returns the error of one that failed.
func together(count int, task func(i int) error) error {
	failures := make(chan error, count)
	var running sync.WaitGroup
	running.Add(count)
	for i := 0; i < count; i++ {
		go func(i int) {
			defer running.Done()
			if err := task(i); err != nil {
				failures <- err
			}
		}(i)
	}
	running.Wait()
	close(failures)
	return <-failures
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second))
}

// percentiles are in microseconds.
type percentiles struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

func summary(times []time.Duration) *percentiles {
	if len(times) == 0 {
		return nil
	}
	sort.Slice(times, func(i, j int) bool { return times[i] < times[j] })
	at := func(percent int) float64 { return float64(times[len(times)*percent/100]) / 1e3 }
	return &percentiles{P50: at(50), P99: at(99)}
}

func residentBytes() (int, error) {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	pages, err := strconv.Atoi(string(bytes.Fields(text)[1]))
	return pages * os.Getpagesize(), err
}
