// A tunnel over hashicorp/yamux as its users write them: one side opens a stream for each connection, the other
// connects each stream to a target. Whether the dialler or the listener opens is told by the command:
//
//	gotunnel agent TRUNK TARGET   dial, accept streams, connect each to TARGET
//	gotunnel relay TRUNK PUBLIC   listen, open a stream for each connection at PUBLIC
//	gotunnel reach TRUNK LOCAL    dial, open a stream for each connection at LOCAL
//	gotunnel serve TRUNK TARGET   listen, accept streams, connect each to TARGET
//
// The library's defaults are left as they are. A dialler dials again whenever its session ends. On SIGTERM it says
// GoAway and ends with its last stream. What it listens at, and each session, is told in a line on standard output.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

const pause = 50 * time.Millisecond

// tunnel has the newest session, which is the one that streams are opened on.
type tunnel struct {
	lock    sync.Mutex
	session *yamux.Session
	// Streams from their beginning to the last byte that went to their connection.
	streams sync.WaitGroup
}

func main() {
	if len(os.Args) != 4 {
		fail(fmt.Errorf("usage: gotunnel agent|relay|reach|serve TRUNK ADDRESS"))
	}
	command, trunk, address := os.Args[1], os.Args[2], os.Args[3]
	t := &tunnel{}
	use := func(session *yamux.Session) { t.accept(session, address) }
	if command == "relay" || command == "reach" {
		use = func(session *yamux.Session) { <-session.CloseChan() }
		go listen("from", address, func(conn net.Conn) { t.open(conn.(*net.TCPConn)) })
	}
	go t.drainOnSignal()
	if command == "agent" || command == "reach" {
		t.dial(trunk, use)
	}
	listen("trunk", trunk, func(conn net.Conn) { t.run(yamux.Server, conn, use) })
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "gotunnel:", err)
	os.Exit(1)
}

func listen(what, address string, handle func(net.Conn)) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		fail(err)
	}
	fmt.Println("listening", what, listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			fail(err)
		}
		go handle(conn)
	}
}

func (t *tunnel) dial(trunk string, use func(*yamux.Session)) {
	for ; ; time.Sleep(pause) {
		if conn, err := net.Dial("tcp", trunk); err == nil {
			t.run(yamux.Client, conn, use)
		}
	}
}

type begin func(io.ReadWriteCloser, *yamux.Config) (*yamux.Session, error)

// run returns when the session has ended.
func (t *tunnel) run(begin begin, conn net.Conn, use func(*yamux.Session)) {
	session, err := begin(conn, nil)
	if err != nil {
		fail(err)
	}
	t.lock.Lock()
	t.session = session
	t.lock.Unlock()
	fmt.Println("connected", conn.RemoteAddr())
	use(session)
	fmt.Println("disconnected", conn.RemoteAddr())
}

func (t *tunnel) newest() *yamux.Session {
	t.lock.Lock()
	defer t.lock.Unlock()
	return t.session
}

// --- streams ---

func (t *tunnel) accept(session *yamux.Session, target string) {
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			return
		}
		t.streams.Add(1)
		go func() {
			defer t.streams.Done()
			conn, err := net.Dial("tcp", target)
			if err != nil {
				// The library has no way to reset a stream.
				stream.Close()
				return
			}
			splice(stream, conn.(*net.TCPConn))
		}()
	}
}

func (t *tunnel) open(conn *net.TCPConn) {
	session := t.newest()
	if session == nil {
		reset(conn)
		return
	}
	stream, err := session.OpenStream()
	if err != nil {
		reset(conn)
		return
	}
	t.streams.Add(1)
	defer t.streams.Done()
	splice(stream, conn)
}

func splice(stream *yamux.Stream, conn *net.TCPConn) {
	done := make(chan struct{})
	go func() {
		io.Copy(stream, conn)
		// The library of 2019, which Debian has, ends its own reading with this; newer ones read on.
		stream.Close()
		close(done)
	}()
	if _, err := io.Copy(conn, stream); err != nil {
		reset(conn)
	} else {
		conn.CloseWrite()
	}
	<-done
	conn.Close()
}

func reset(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

// --- the end ---

func (t *tunnel) drainOnSignal() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	<-signals
	session := t.newest()
	if session != nil {
		session.GoAway()
		fmt.Println("draining", session.NumStreams())
	}
	t.streams.Wait()
	for session != nil && session.NumStreams() > 0 && !session.IsClosed() {
		time.Sleep(pause)
	}
	os.Exit(0)
}
